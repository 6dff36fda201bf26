"""`alpha * norm(z) + b` on every path."""

from typing import Any

import pytest
from helpers_kernels import EXAMPLES, PATHS, check, drawn, dtypes, layouts, leading, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd import functional as sdd_F
from sdd.functional import alpha_size


@st.composite
def groups(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """One group, heads, or parts of which some are plain."""
    n_parts = draw(st.sampled_from([1, 1, 3]))
    part = st.tuples(st.integers(1, 5), st.integers(1, 20), st.booleans())
    parts = [draw(part) for _ in range(n_parts)]
    return tuple((heads * width, width if normed or n_parts == 1 else 0) for heads, width, normed in parts)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=EXAMPLES)
@given(
    seed=seeds,
    shape=leading,
    parts=groups(),
    shared=st.booleans(),
    bias=st.booleans(),
    row_eps=st.booleans(),
    dtype=dtypes,
    result_dtype=dtypes,
    layout=layouts,
    gradient_layout=layouts,
)
def test_values_and_gradients(
    path, seed, shape, parts, shared, bias, row_eps, dtype, result_dtype, layout, gradient_layout
):
    width = sum(part for part, _ in parts)
    arguments: dict[str, Any] = {
        "z": drawn(seed, *shape, width, dtype=dtype, layout=layout),
        "alpha": drawn(seed + 1, alpha_size(parts, shared), layout="every other row"),
        "bias": drawn(seed + 2, width) if bias else None,
        "group": parts,
        "eps": drawn(seed + 3, *shape).square() if row_eps else 1e-3,
        "dtype": result_dtype,
    }
    kept_narrow = path == "triton" and result_dtype.itemsize < dtype.itemsize
    check(path, "scaled_norm", sdd_F.scaled_norm, arguments, seed + 4, gradient_layout, kept_narrow)
