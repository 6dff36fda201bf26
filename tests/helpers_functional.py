"""Inputs that the tests of `sdd.functional` draw."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

HALF = [torch.bfloat16, torch.float16]
drawn = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
