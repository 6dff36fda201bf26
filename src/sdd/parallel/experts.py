"""Expert parallelism: each of P processes holds E/P experts of every mixture, and tokens travel to their experts.

    route       each process routes its own tokens, and sorts their rows by expert: rows of one process are consecutive
    there       rows and their counts go to the processes that hold their experts (all-to-all; nothing is dropped, and
                nothing is padded to a capacity)
    experts     each process sorts what it received by its own experts, and computes as one process does
    back        the outputs go back in the same way, and are added up with the weights of the router at home

The P processes are those of `expert` and of `tensor`: the latter have other tokens of the same sequences.

The derivative of an all-to-all is the all-to-all back. So the gradient of an expert is the sum over the tokens of all P
processes, where other gradients are means over those that have other rows: `complete_gradients` sees to that.

Matrices and alphas of the experts are DTensors cut over the P processes, and FSDP2 cuts the matrices further over
`shard`. Alphas are whole float32 vectors of each expert. A cut mixture runs as the equations of `sdd.models.moe`.

Shape suffixes: M rows of this process's tokens, R rows that it received, E experts, P processes, C d_model.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sdd.kernels.experts import Order, collect, dispatch, sort_by_expert
from sdd.models.moe import MoE
from sdd.parallel.mesh import experts_mesh, submesh
from sdd.parameters import held

#: What computes the rows of experts: `[R, C]` and their order to `[R, C]`.
Experts = Callable[[Tensor, Order], Tensor]


class Exchange:
    """Takes rows to the processes that hold their experts, and the outputs back.

    Args:
        mesh: of the P processes, one dimension.

    Attributes:
        sent_bytes: what this process sent to others for passes with gradients, forward and backward, since it was last
            set to 0.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.sent_bytes = 0

    @torch.compiler.disable  # the shapes depend on the routing
    def through(self, experts: Experts, x_MC: Tensor, order: Order) -> Tensor:
        """Each row through its expert, wherever that is; `[M, C]` to `[M, C]`.

        Args:
            experts: computes the rows of this process's experts.
            x_MC: sorted by expert.
            order: of these rows, over all experts.
        """
        sent_PE = order.counts_E.view(self.mesh.size(), -1)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=self.group)
        there, here = torch.stack([sent_PE.sum(1), received_PE.sum(1)]).tolist()
        received = _order_of(received_PE, sum(here))
        y_RC = experts(dispatch(self._moved(x_MC, there, here), received), received)
        return self._moved(collect(y_RC, received), here, there)

    def _moved(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        count = self._count if torch.is_grad_enabled() else None
        return _AllToAll.apply(rows, sent, received, self.group, count)  # pyright: ignore[reportReturnType]

    def _count(self, rows: Tensor, sent: list[int]) -> None:
        away = sum(sent) - sent[self.mesh.get_local_rank()]
        self.sent_bytes += away * rows.shape[1] * rows.itemsize


class CutMoE(MoE):
    """A mixture of which each process holds some experts.

    Attributes:
        exchange: between the processes.
        group: the experts that this process holds.
        copies: how many processes hold the same experts, or parts of them.
    """

    exchange: Exchange
    group: "ExpertGroup"
    copies: int

    def experts(self, x_MC: Tensor, order: Order) -> Tensor:
        """Each row through its expert: `[M, C]` to `[M, C]`."""
        return self.exchange.through(self.group, x_MC, order)  # pyright: ignore[reportAttributeAccessIssue]


class ExpertGroup(nn.Module):
    """The experts that a process holds as one module, whose matrices FSDP2 gathers at once.

    Its projections stay those of the mixture, under their names there.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = moe.gate_proj, moe.up_proj, moe.down_proj
        self._compute = partial(MoE.experts, moe)

    def forward(self, x_RC: Tensor, order: Order) -> Tensor:
        """`[R, C]` to `[R, C]`."""
        return self._compute(x_RC, order)


def cut_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's experts of every mixture of a model, in place.

    Args:
        model: with weights or on "meta".
        mesh: of all processes; those of `expert` and `tensor` together must divide the number of experts.
    """
    holders, others = experts_mesh(mesh), submesh(mesh, "replicate", "shard", "context")
    assert holders is not None
    exchange = Exchange(holders)
    everywhere = holders if others is None else DeviceMesh._concatenate([others, holders])
    copies = [*[Replicate()] * (everywhere.ndim - 1), Shard(0)]
    for moe in [module for module in model.modules() if isinstance(module, MoE)]:
        for layer in (moe.gate_proj, moe.up_proj, moe.down_proj):
            _cut(layer, "weight", holders, [Shard(0)])
            _cut(layer, "alpha", everywhere, copies)
        moe.__class__ = CutMoE
        assert isinstance(moe, CutMoE)
        moe.exchange, moe.group, moe.copies = exchange, ExpertGroup(moe), everywhere.size() // holders.size()


def mixtures(model: nn.Module) -> Iterator[CutMoE]:
    """Yield the mixtures that are cut."""
    for module in model.modules():
        if isinstance(module, CutMoE):
            yield module


def exchange_of(model: nn.Module) -> Exchange | None:
    """The exchange that all mixtures of a model share; None if none is cut."""
    return next((moe.exchange for moe in mixtures(model)), None)


@torch.no_grad()
def complete_gradients(model: nn.Module, data_size: int) -> None:
    """Make the gradients of experts the mean over all data ranks, after a backward pass.

    Those of matrices are sums over the P processes and means over all that hold the same experts, those of alphas are
    sums over the P processes alone.

    Args:
        model: with cut mixtures, or without, and then nothing happens.
        data_size: the number of parts that the rows of a batch are cut into.
    """
    alphas: list[DTensor] = []
    for moe in mixtures(model):
        for layer in (moe.gate_proj, moe.up_proj, moe.down_proj):
            if layer.weight.grad is not None:
                held(layer.weight.grad).mul_(moe.copies / data_size)
            gradient = None if (alpha := getattr(layer, "alpha", None)) is None else alpha.grad
            if isinstance(gradient, DTensor):
                alphas.append(gradient)
    if not alphas:
        return
    parts = [gradient.to_local() for gradient in alphas]
    mean = torch.cat([part.flatten() for part in parts]) / data_size
    mesh = alphas[0].device_mesh
    for dim in range(mesh.ndim - 1):  # the last is that of the P processes
        dist.all_reduce(mean, group=mesh.get_group(dim))
    for part, total in zip(parts, mean.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))


def _cut(layer: nn.Module, name: str, mesh: DeviceMesh, placements: list[Any]) -> None:
    """Keep this process's part of a parameter, if the layer has it, as a DTensor."""
    parameter = layer._parameters.get(name)
    if parameter is not None:
        part = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        setattr(layer, name, nn.Parameter(part, parameter.requires_grad))


def _order_of(received_PE: Tensor, n_rows: int) -> Order:
    """The order by expert of rows that come by process, and of each process by expert; the counts are given."""
    P, E = received_PE.shape
    experts_PE = torch.arange(E, device=received_PE.device).expand(P, E)
    experts_R = experts_PE.flatten().repeat_interleave(received_PE.flatten(), output_size=n_rows)
    return sort_by_expert(experts_R.unsqueeze(1), E)


class _AllToAll(torch.autograd.Function):
    """Send consecutive rows to the processes of a group; the derivative sends them back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, count: Any
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.count = sent, received, group, count
        return _all_to_all(rows, sent, received, group, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        back = _all_to_all(gradients[0], ctx.received, ctx.sent, ctx.group, ctx.count)
        return back, None, None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, count: Any) -> Tensor:
    if count is not None:
        count(rows, sent)
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
