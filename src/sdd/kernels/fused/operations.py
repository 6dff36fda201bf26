"""The functions that the dispatch calls, with the names and arguments of their references.

Signatures stand at the references (`sdd.functional`, `sdd.kernels.experts`), whose defaults the dispatch fills in.
"""

from sdd.kernels.fused.expert_norm import expert_scaled_norm
from sdd.kernels.fused.qk_norm_rope import qk_norm_rope
from sdd.kernels.fused.residual_norm import residual_norm, residual_postnorm, residual_prenorm
from sdd.kernels.fused.scaled_norm import scaled_norm
from sdd.kernels.fused.swiglu import expert_swiglu, expert_swiglu_bare_up, sdd_swiglu, sdd_swiglu_bare_up, swiglu

__all__ = [
    "expert_scaled_norm",
    "expert_swiglu",
    "expert_swiglu_bare_up",
    "qk_norm_rope",
    "residual_norm",
    "residual_postnorm",
    "residual_prenorm",
    "scaled_norm",
    "sdd_swiglu",
    "sdd_swiglu_bare_up",
    "swiglu",
]
