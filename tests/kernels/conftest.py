"""Kernels run on a CUDA device if there is one (their tests then carry the mark `gpu`), else interpreted on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers_interpreter import mend_interpreter

mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, which this hook is not limited to."""
    for item in items:
        if torch.cuda.is_available() and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


#: The most features that a program holds at once, and the widths of its blocks of columns, small for narrow tests.
SMALL = {"MAX_BLOCK": 16, "MAX_FUSED": 16, "MAX_PAIR": 16, "MAX_EXPERT": 16, "WIDE_BLOCK": 8, "COLUMN_BLOCK": 8}
#: Rows that one program reads in turn, block after block.
IN_TURN = {"HELD_BLOCK": 8, "LOOP_BLOCK": 8}
MODULES = ("common", "scaled_norm_kernels", "swiglu", "residual_norm", "qk_norm_rope", "expert_norm")


@pytest.fixture(params=[{}, IN_TURN, SMALL], ids=["one block", "blocks in turn", "several blocks"])
def _one_block_and_several(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 16 features in one block, in blocks that one program reads in turn, and in several programs."""
    for module in MODULES:
        for constant, value in request.param.items():
            monkeypatch.setattr(f"sdd.kernels.fused.{module}.{constant}", value, raising=False)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    """Operations without a fixed order raise, and new memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
