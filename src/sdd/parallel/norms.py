"""Norms over features of which each process holds a part.

With D features over all processes, z the part of one process, alpha and b those of its features,

    s = (1/D) * sum over processes of sum(z^2)       r = 1/sqrt(s + eps)       y = alpha * r * z + b

and for an incoming gradient g of y, with n = r * z,

    dz = r * (alpha * g - n * m)       m = (1/D) * sum over processes of sum(alpha * g * n)

So a token costs one all-reduce of one number of at least float32 forward, and one backward: the one in `s` and the one
in `m`, which is the derivative of the first. A norm whose groups each lie on one process costs none.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sdd.functional import statistics_dtype
from sdd.parallel.exchange import combined


def sharded_norm(z: Tensor, mesh: DeviceMesh, eps: float = 1e-6) -> Tensor:
    """`norm(z) = z / sqrt(mean(z^2) + eps)`, the mean over the features of all processes.

    Args:
        z: this process's features, `[..., D / processes]`, any floating dtype.
        mesh: of the processes, one dimension. All of them call this with equally many features.
        eps: added to the mean square, inside the root.

    Returns:
        `[..., D / processes]` in at least float32.
    """
    z = z.to(statistics_dtype(z.dtype))
    s = combined(z.square().sum(-1, keepdim=True), mesh) / (z.shape[-1] * mesh.size())
    return z * torch.rsqrt(s + eps)


def sharded_scaled_norm(
    z: Tensor, alpha: Tensor | None, bias: Tensor | None = None, *, mesh: DeviceMesh, eps: float = 1e-6
) -> Tensor:
    """`alpha * norm(z) + b`, see `sharded_norm`.

    Args:
        z: this process's features, `[..., D / processes]`.
        alpha: the scales of these features, or None.
        bias: `[D / processes]` or None, added after the scale.
        mesh: of the processes.
        eps: added to the mean square, inside the root.

    Returns:
        `[..., D / processes]` in the dtype of z; alpha and bias are applied in at least float32 before the cast.
    """
    y = sharded_norm(z, mesh, eps)
    if alpha is not None:
        y = alpha * y
    return (y if bias is None else y + bias).to(z.dtype)
