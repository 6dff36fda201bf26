"""What the processes of a tensor-parallel group exchange, each operation with its derivative.

The group computes one loss, and every process ends up with it. A tensor is either the same on all processes, or each
has its own part, or each has a summand. A gradient is of the one loss. So the derivative of an exchange is the
transposed exchange:

    operation      forward                               backward
    `shared`       the same -> the same                  sum of the summands
    `gathered`     parts -> all                          sum of the summands, of which each takes its part
    `joined`       parts -> all                          each takes its part: what follows is the same on all
    `summed`       summands -> the sum                   the same
    `scattered`    summands -> parts of the sum          all of the parts
    `combined`     summands -> the sum                   sum of the summands: what follows differs

All are DTensor's, through placements, so autograd and torch.compile know them.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def shared(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that is the same on all processes, before each uses another part of it or for another purpose."""
    return _placed(x, mesh, Replicate()).to_local(grad_placements=[Partial()])


def gathered(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All parts along a dimension, before each process uses them for another purpose."""
    return _moved(x, mesh, Shard(dim), Replicate()).to_local(grad_placements=[Partial()])


def joined(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All parts along a dimension, which all processes then use alike."""
    return _moved(x, mesh, Shard(dim), Replicate()).to_local()


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over processes, which all then use alike."""
    return _moved(x, mesh, Partial(), Replicate()).to_local()


def scattered(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This process's part, along a dimension, of the sum over processes."""
    return _moved(x, mesh, Partial(), Shard(dim)).to_local()


def combined(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over processes, before each uses it for another purpose."""
    return _moved(x, mesh, Partial(), Replicate()).to_local(grad_placements=[Partial()])


def part_of(x: Tensor, mesh: DeviceMesh, dim: int = 0) -> Tensor:
    """This process's part of a tensor that all have; there are as many equal parts as processes."""
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def _placed(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return DTensor.from_local(x, mesh, [placement], run_check=False)


def _moved(x: Tensor, mesh: DeviceMesh, placement: Placement, to: Placement) -> DTensor:
    return _placed(x, mesh, placement).redistribute(placements=[to])
