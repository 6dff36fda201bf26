"""The Triton kernels, each operation registered as `torch.ops.sdd.*`; importing this imports Triton."""

from sdd.kernels.fused.scaled_norm import scaled_norm

__all__ = ["scaled_norm"]
