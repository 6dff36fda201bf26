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
    dtype=dtypes,
    layout=layouts,
    gradient_layout=layouts,
)
def test_values_and_gradients(path, seed, shape, width, gate, up, dtype, layout, gradient_layout):
    arguments: dict[str, Any] = {
        "z_gate": drawn(seed, *shape, width, dtype=dtype, layout=layout),
        "z_up": drawn(seed + 1, *shape, width, dtype=dtype, layout=layout),
        "alpha_gate": drawn(seed + 2, width) if gate or up == "joint" else None,
        "alpha_up": drawn(seed + 3, width) if up != "plain" else None,
        "eps": 1e-3,
    }
    if up == "bare":
        check(
            path,
            "sdd_swiglu_bare_up",
            sdd_F.sdd_swiglu_bare_up,
            arguments,
            seed + 4,
            gradient_layout,
            path == "recompute",
        )
        return
    arguments |= {"joint": up == "joint", "up_eps": None if up == "joint" else 1e-2}
    check(path, "sdd_swiglu", sdd_F.sdd_swiglu, arguments, seed + 4, gradient_layout, path == "recompute")
