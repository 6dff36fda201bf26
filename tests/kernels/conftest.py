"""Kernels run on a CUDA device if there is one (their tests then carry the mark `gpu`), else interpreted on the CPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be asked for"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, which this hook is not limited to."""
    for item in items:
        if torch.cuda.is_available() and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
