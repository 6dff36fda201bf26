"""Layers of which each process holds a part: matrices cut by rows or columns, norms and scales of the cut features.

A matrix is a DTensor, of which each process holds its rows or its columns, so that FSDP2 can shard it further. Vectors
(alpha, biases, the scales of norms) stay whole, plain and float32 on every process, which uses the elements of its
features.

A layer becomes one of these by a change of its class, and keeps its parameters, names and hooks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sdd import probe_points
from sdd.errors import UserError
from sdd.functional import norm
from sdd.kernels import scaled_norm
from sdd.models.block import FeedForward
from sdd.models.joint import call_jointly
from sdd.nn import LearnedScale, RMSNorm, SDDLinear
from sdd.parallel.exchange import part_of, shared, summed
from sdd.parallel.norms import sharded_norm, sharded_scaled_norm
from sdd.parameters import whole

#: What comes before a product and after it: an exchange between processes, or nothing.
Exchange = Callable[[Tensor], Tensor]


class _Cut(nn.Module):
    """What cut layers share.

    Attributes:
        mesh: the processes that hold the parts, one dimension.
        exchange: before a column-parallel product, or after a row-parallel one.
        adds_up: whether the backward pass adds up the gradients of vectors over the processes, each of which has that
            of its own features or tokens; else the caller does, for all at once.
    """

    mesh: DeviceMesh
    exchange: Exchange
    adds_up: bool

    @property
    def spans(self) -> bool:
        """Whether there is a norm over the features of all processes."""
        return False

    def mine(self, vector: Tensor) -> Tensor:
        """The elements of a vector that belong to this process's features."""
        return part_of(self.all_of(vector), self.mesh)

    def all_of(self, vector: Tensor) -> Tensor:
        """The whole vector, which each process uses for other features or tokens."""
        return shared(vector, self.mesh) if self.adds_up and vector.requires_grad else vector

    def over_processes(self, mean_squares: Tensor) -> Tensor:
        """The mean squares under the norm, from those of this process's features; for a probe, without gradient."""
        return summed(mean_squares, self.mesh) / self.mesh.size() if self.spans else mean_squares


def refuse_adapters(added: Tensor | None, alpha: Tensor | None) -> None:
    """Refuse what an adapter gives a layer beside its input.

    Raises:
        UserError: if it gives something: it knows nothing of parts.
    """
    if added is not None or alpha is not None:
        raise UserError("an adapter does not fit a layer that processes share: merge it before the model is cut")


class ColwiseLinear(_Cut, nn.Linear):
    """`nn.Linear` with the output features cut."""

    def forward(self, input: Tensor) -> Tensor:
        """All features of the input, this process's features of the output."""
        bias = None if self.bias is None else self.mine(self.bias)
        return F.linear(self.exchange(input), local(self.weight), bias)


class ColwiseSDDLinear(_Cut, SDDLinear):
    """`SDDLinear` with the output features cut: groups of features stay on one process, one of full width spans all."""

    @property
    def spans(self) -> bool:
        """Whether there is one group."""
        return self.parts[0][1] == self.out_features

    def product(self, input: Tensor) -> Tensor:
        """This process's features of `V x`."""
        return F.linear(self.exchange(input), local(self.weight))

    def forward(self, input: Tensor, added: Tensor | None = None, alpha: Tensor | None = None) -> Tensor:
        """All features of the input, this process's features of the output; without adapters."""
        refuse_adapters(added, alpha)
        z = self.product(input)
        scale = self.all_of(self.alpha) if self.shared_alpha else self.mine(self.alpha)
        bias = None if self.bias is None else self.mine(self.bias)
        if self.spans:
            y = sharded_scaled_norm(z, scale, bias, mesh=self.mesh, eps=self.eps)
        else:
            y = scaled_norm(z, scale, bias, group=self.parts[0][1], eps=self.eps)
        probe_points.projection(self, z, y)
        return y


class RowwiseLinear(_Cut, nn.Linear):
    """`nn.Linear` with the input features cut."""

    def forward(self, input: Tensor) -> Tensor:
        """This process's features of the input, all features of the output."""
        z = self.exchange(F.linear(input, local(self.weight)))
        return z if self.bias is None else z + self.all_of(self.bias)


class RowwiseSDDLinear(_Cut, SDDLinear):
    """`SDDLinear` with the input features cut: the norm comes after the sum over processes."""

    def forward(self, input: Tensor, added: Tensor | None = None, alpha: Tensor | None = None) -> Tensor:
        """This process's features of the input, all features of the output; without adapters."""
        refuse_adapters(added, alpha)
        z = self.exchange(F.linear(input, local(self.weight)))
        bias = None if self.bias is None else self.all_of(self.bias)
        y = scaled_norm(z, self.all_of(self.alpha), bias, group=self.parts, eps=self.eps)
        probe_points.projection(self, z, y)
        return y


class CutRMSNorm(_Cut, RMSNorm):
    """`RMSNorm` of features that are cut."""

    @property
    def spans(self) -> bool:
        """Whether there is one group."""
        return self.group is None

    def forward(self, x: Tensor) -> Tensor:
        """This process's features of input and output."""
        if self.weight is None:
            y = sharded_norm(x, self.mesh, self.eps) if self.spans else norm(x, self.eps, self.group)
            return (self.factor * y).to(x.dtype)
        weight = self.all_of(self.weight) if self.width == self.group else self.mine(self.weight)
        weight = weight if self.factor == 1 else self.factor * weight
        if self.spans:
            return sharded_scaled_norm(x, weight, mesh=self.mesh, eps=self.eps)
        return scaled_norm(x, weight, group=self.group, eps=self.eps)


class ForeignRMSNorm(_Cut):
    """A norm of another library, `weight * norm(x)`, of features that are cut; a base of a class made for each."""

    @property
    def spans(self) -> bool:
        """Always."""
        return True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """This process's features of input and output."""
        eps = getattr(self, "variance_epsilon", getattr(self, "eps", None))
        assert isinstance(eps, float)
        y = sharded_scaled_norm(hidden_states, None, mesh=self.mesh, eps=eps)
        return self.mine(self.get_parameter("weight")) * y


class CutScale(_Cut, LearnedScale):
    """`LearnedScale` of features that are cut."""

    def forward(self) -> Tensor:
        """The scales of this process's features."""
        return self.mine(super().forward())


class CutEmbedding(_Cut, nn.Embedding):
    """`nn.Embedding` of which each process keeps some rows, and uses all."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Embedding`."""
        return F.embedding(input, whole(self.weight))


class CutRouter(_Cut, nn.Linear):
    """The router of a mixture, of which each process keeps some rows, and uses all for its own tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return F.linear(input, whole(self.weight))


class CutFeedForward(FeedForward):
    """`FeedForward` whose gate and up projections are cut by rows; a norm over both spans all processes."""

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.gate_proj, self.up_proj
        assert isinstance(gate, ColwiseSDDLinear)
        assert isinstance(up, ColwiseSDDLinear)

        def compute(x_gate: Tensor, x_up: Tensor) -> tuple[Tensor, Tensor]:
            z = torch.cat([gate.product(x_gate), up.product(x_up)], -1)
            alpha = torch.cat([gate.mine(gate.alpha), up.mine(up.alpha)])
            y_gate, y_up = sharded_scaled_norm(z, alpha, mesh=gate.mesh, eps=gate.eps).chunk(2, -1)
            probe_points.projection(gate, z, y_gate)
            probe_points.projection(up, z, y_up)
            return y_gate, y_up

        return call_jointly(gate, up, ColwiseSDDLinear, compute, x)


def local(weight: Tensor) -> Tensor:
    """The part of a matrix that this process holds; its gradient is that of the part."""
    assert isinstance(weight, DTensor)
    return weight.to_local()


def cut_matrix(module: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Keep this process's part of `module.weight`, as a DTensor."""
    weight = module.get_parameter("weight")
    part = distribute_tensor(weight.detach(), mesh, [Shard(dim)], src_data_rank=None)
    module.weight = nn.Parameter(part, weight.requires_grad)
