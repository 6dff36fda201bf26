"""Normed and rotated heads on every path."""

from typing import Any

import pytest
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
    dtype=dtypes,
    layout=layouts,
    gradient_layout=layouts,
)
def test_values_and_gradients(path, seed, batch, length, n_heads, half, norm, dtype, layout, gradient_layout):
    head_dim = 2 * half
    width = n_heads * head_dim
    cos, sin = sdd_F.rope_tables(length + 3, head_dim, theta=20.0, device=DEVICE)
    arguments: dict[str, Any] = {
        "z": drawn(seed, *batch, length, width, dtype=dtype, layout=layout),
        "alpha": None if norm == "none" else drawn(seed + 1, head_dim if norm == "shared" else width),
        "cos": cos[3:],
        "sin": sin[3:],
        "n_heads": n_heads,
        "group": {"full": None, "none": None, "by pairs": 2}.get(norm, head_dim),
        "eps": 1e-3,
    }
    rounded = norm == "by pairs" and path == "triton"
    check(path, "qk_norm_rope", sdd_F.qk_norm_rope, arguments, seed + 2, gradient_layout, rounded)
