"""Fused operations and the choice of who runs them; every function has its reference in `sdd.functional`.

Those for rows of experts have theirs in `sdd.kernels.experts`.
"""

from sdd.kernels.dispatch import (
    Path,
    expert_swiglu,
    expert_swiglu_bare_up,
    path_of,
    qk_norm_rope,
    residual_norm,
    residual_postnorm,
    residual_prenorm,
    scaled_norm,
    sdd_swiglu,
    sdd_swiglu_bare_up,
    swiglu,
    use,
)

__all__ = [
    "Path",
    "expert_swiglu",
    "expert_swiglu_bare_up",
    "path_of",
    "qk_norm_rope",
    "residual_norm",
    "residual_postnorm",
    "residual_prenorm",
    "scaled_norm",
    "sdd_swiglu",
    "sdd_swiglu_bare_up",
    "swiglu",
    "use",
]
