"""Normed and rotated heads on every path."""

from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE, EXAMPLES, PATHS, check, drawn, dtypes, layouts, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd import functional as sdd_F


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    batch=st.sampled_from([(), (2,), (1, 2)]),
    length=st.integers(0, 3),
    n_heads=st.integers(1, 5),
    half=st.integers(1, 9),
    norm=st.sampled_from(["none", "full", "head", "shared", "by pairs"]),
    row_eps=st.booleans(),
    own_positions=st.booleans(),
    dtype=dtypes,
    layout=layouts,
    gradient_layout=layouts,
)
def test_values_and_gradients(
    path, seed, batch, length, n_heads, half, norm, row_eps, own_positions, dtype, layout, gradient_layout
):
    head_dim = 2 * half
    width = n_heads * head_dim
    cos, sin = sdd_F.rope_tables(length + 3, head_dim, theta=20.0, device=DEVICE)
    positions = torch.arange(3, length + 3, device=DEVICE)
    if own_positions:  # of each row
        positions = torch.randint(0, length + 3, (*batch, 1, length), generator=torch.Generator().manual_seed(seed))
        positions = positions.to(DEVICE)
    arguments: dict[str, Any] = {
        "z": drawn(seed, *batch, length, width, dtype=dtype, layout=layout),
        "alpha": None if norm == "none" else drawn(seed + 1, head_dim if norm == "shared" else width),
        "cos": cos[positions],
        "sin": sin[positions],
        "n_heads": n_heads,
        "group": {"full": None, "none": None, "by pairs": 2}.get(norm, head_dim),
        "eps": drawn(seed + 3, *batch, length).square() + 1e-3 if row_eps else 1e-3,
    }
    rounded = path == "triton" and (norm == "by pairs" or row_eps)
    check(path, "qk_norm_rope", sdd_F.qk_norm_rope, arguments, seed + 4, gradient_layout, rounded)
