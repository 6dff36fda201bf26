"""The dtype in which norms are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# a global, not a context variable: the backward pass of autograd has threads of its own
_statistics: torch.dtype | None = None


@contextmanager
def statistics_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute norms in another dtype inside the block, to study what their precision does; in composed operations only.

    `norm(z)` is then z, its mean square, their quotient and a sum with the residual stream, each rounded to dtype.
    """
    global _statistics
    before, _statistics = _statistics, dtype
    try:
        yield
    finally:
        _statistics = before


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32; float64 stays float64."""
    return _statistics or at_least_float32(dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The same, whatever norms are computed in: for what is measured of them."""
    return torch.promote_types(dtype, torch.float32)
