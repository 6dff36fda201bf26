"""SwiGLU of normed, scaled and plain projections on every path."""

from typing import Any

import pytest
from helpers_kernels import EXAMPLES, PATHS, check, drawn, dtypes, layouts, leading, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd import functional as sdd_F


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    shape=leading,
    width=st.integers(1, 40),
    gate=st.booleans(),
    up=st.sampled_from(["plain", "normed", "joint", "bare"]),
    row_eps=st.booleans(),
    dtype=dtypes,
    layout=layouts,
    gradient_layout=layouts,
)
def test_values_and_gradients(path, seed, shape, width, gate, up, row_eps, dtype, layout, gradient_layout):
    arguments: dict[str, Any] = {
        "z_gate": drawn(seed, *shape, width, dtype=dtype, layout=layout),
        "z_up": drawn(seed + 1, *shape, width, dtype=dtype, layout=layout),
        "alpha_gate": drawn(seed + 2, width) if gate or up == "joint" else None,
        "alpha_up": drawn(seed + 3, width) if up != "plain" else None,
        "eps": drawn(seed + 4, *shape).square() + 1e-3 if row_eps else 1e-3,
    }
    name, rounded = "sdd_swiglu_bare_up", path == "recompute" or row_eps
    if up != "bare":
        name, up_eps = "sdd_swiglu", drawn(seed + 5, *shape).square() + 1e-2 if row_eps else 1e-2
        arguments |= {"joint": up == "joint", "up_eps": None if up == "joint" else up_eps}
    check(path, name, getattr(sdd_F, name), arguments, seed + 6, gradient_layout, rounded)
