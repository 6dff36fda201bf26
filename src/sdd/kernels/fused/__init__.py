"""The Triton kernels, each operation registered as `torch.ops.sdd.*`; importing this imports Triton."""

from sdd.kernels.fused import operations

__all__ = ["operations"]
