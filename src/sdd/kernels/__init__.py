"""Fused operations, made from their references in `sdd.functional` (for experts: `sdd.kernels.experts`).

`use` forces the implementation that runs them; `path_of` tells which one runs.
"""

from sdd.kernels.dispatch import (
    Path,
    expert_scaled_norm,
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
    "expert_scaled_norm",
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
