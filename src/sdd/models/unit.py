"""Matrices whose rows or columns are unit vectors, and the lengths of a matrix and its vectors.

A matrix that reads the residual stream (q, k, v, gate, up, head; the embedding, which is read by rows) has one vector a
row; one that writes to it (attention output, down) has one a column: each vector is as long as the stream is wide
(arXiv 2410.01131). Experts are stacked matrices.

Lengths are float64, also of a matrix of which each process holds a part (a DTensor).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_WRITERS = ("o_proj", "down_proj")


def projections(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The matrices of the blocks' projections, each with the dimension along which its vectors lie: -1 or -2."""
    for name, module in model.named_modules():
        role = name.rsplit(".", 1)[-1]
        if role in _READERS or role in _WRITERS:
            yield module.get_parameter("weight"), -1 if role in _READERS else -2


@torch.no_grad()
def make_unit(model: nn.Module) -> None:
    """Bring the vectors of every projection, of the embedding and of the head to length 1; zeros stay zero."""
    ends = [(module.get_parameter("weight"), -1) for name, module in model.named_modules() if name in ("embed", "head")]
    for weight, dim in (*ends, *projections(model)):
        rescale(weight, 1.0, (dim,))


@torch.no_grad()
def rescale(weight: Tensor, length: Tensor | float, dims: tuple[int, ...]) -> None:
    """Bring a matrix, in place, to this length over some dimensions; a part that is zero stays zero."""
    now = length_of(weight, dims)
    weight.mul_(torch.where(now > 0, length / now, 0.0))


def length_of(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The root of the sum of squares over some dimensions, which are kept."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(weight.detach(), dim=dims, keepdim=True, dtype=dtype)
