"""Kernels run on a CUDA device if there is one (those tests then carry the mark `gpu`), else interpreted on the CPU."""

import os
import sys

import pytest
import torch

from sdd.kernels.dispatch import HAS_TRITON

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be asked for"

NEEDS_KERNELS = "path"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here) and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
