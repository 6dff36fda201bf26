"""The Triton kernels, each operation registered as `torch.ops.sdd.*`; importing this imports Triton."""

from sdd.kernels.fused.scaled_norm import scaled_norm
from sdd.kernels.fused.swiglu import sdd_swiglu, sdd_swiglu_bare_up

__all__ = ["scaled_norm", "sdd_swiglu", "sdd_swiglu_bare_up"]
