"""The residual addition with the norms before and after it, on every path."""

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
    normed=st.booleans(),
    row_eps=st.booleans(),
    post=st.sampled_from(["none", "post-norm", "pre-norm"]),
    scale=st.sampled_from([1.0, 1.7]),
    dtype=dtypes,
    stream_dtype=dtypes,
    layout=layouts,
    gradient_layout=layouts,
)
def test_values_and_gradients(
    path, seed, shape, width, normed, row_eps, post, scale, dtype, stream_dtype, layout, gradient_layout
):
    arguments: dict[str, Any] = {
        "z": drawn(seed, *shape, width, dtype=dtype, layout=layout),
        "residual": drawn(seed + 1, *shape, width, dtype=stream_dtype, layout=layout),
        "alpha": drawn(seed + 2, width) if normed else None,
        "residual_scale": scale,
        "eps": drawn(seed + 3, *shape).square() if row_eps and normed else 1e-3,
    }
    rounded = path == "triton" and not normed  # the kernels keep the stream as it is stored
    if post == "pre-norm":
        arguments |= {"norm_alpha": drawn(seed + 4, width), "norm_eps": 1e-2}
        check(path, "residual_prenorm", sdd_F.residual_prenorm, arguments, seed + 5, gradient_layout, rounded)
    else:
        arguments |= {"post_alpha": drawn(seed + 4, width) if post == "post-norm" else None, "post_eps": 1e-2}
        check(path, "residual_norm", sdd_F.residual_norm, arguments, seed + 5, gradient_layout, rounded)
