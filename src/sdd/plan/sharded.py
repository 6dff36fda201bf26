"""One process of a layout: what it keeps and exchanges, traced on the real model without its numbers.

The model is cut as in training, over a fake process group that exchanges nothing, and its step runs on fake tensors. So
memory and traffic are those of the code that trains, whatever a layout does. Fake tensors stand on the CPU:
Muon gathers float32 there, and bfloat16 on a GPU.

Where the length of an exchange depends on the numbers, as between experts, tokens are taken to be spread evenly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode

from sdd import kernels
from sdd.errors import UserError
from sdd.models import LanguageModel
from sdd.parallel.layout import ParallelConfig
from sdd.plan.measure import LiveBytes, MemoryCase, PassMemory, fake_model, run_measured, shallow, too_large
from sdd.plan.memory import Memory
from sdd.plan.traffic import CountTraffic, Stream, Traffic, Volume
from sdd.train.optim import build_optimizer, clip_gradients
from sdd.train.parallel import World
from sdd.train.sharding import average_gradients, shard_model


@dataclass(frozen=True)
class Trace:
    """What the first process of a layout keeps and exchanges; the first has the largest parts.

    Attributes:
        weights, gradients, moments: bytes.
        held: bytes of a forward and backward pass on top of these.
        of_pass: traffic of a forward and backward pass.
        of_step: traffic of what follows the last pass of a step: gradients of vectors, clipping, the optimiser.
    """

    weights: int
    gradients: int
    moments: int
    held: PassMemory
    of_pass: Traffic
    of_step: Traffic

    @property
    def memory(self) -> Memory:
        """By part, as in `sdd.plan.memory`."""
        held = self.held.activations + self.held.copies
        loss = max(self.held.loss_forward, self.held.loss_backward)
        block = max(self.held.blocks_forward, self.held.blocks_backward, self.held.embedding_backward)
        return Memory(
            weights=self.weights,
            moments=self.moments,
            gradients=self.gradients,
            copies=self.held.copies,
            activations=self.held.activations,
            loss=max(0, loss - held),
            block=max(0, block - held),
        )

    def traffic(self, passes: int) -> Traffic:
        """Traffic of a step of so many passes."""
        return _combined(self.of_pass, self.of_step, lambda a, b: passes * a + b)

    def deeper(self, other: "Trace", blocks: int) -> "Trace":
        """The trace with so many blocks more, where `other` has one more than this."""

        def grown(a: int, b: int) -> int:
            return a + blocks * (b - a)

        return Trace(
            grown(self.weights, other.weights),
            grown(self.gradients, other.gradients),
            grown(self.moments, other.moments),
            PassMemory(*map(grown, self.held, other.held)),
            _combined(self.of_pass, other.of_pass, grown),
            _combined(self.of_step, other.of_step, grown),
        )


def trace(case: MemoryCase, layout: ParallelConfig) -> Trace:
    """Trace one process of a layout.

    Blocks of a kind are alike, so a deep model is traced at two small depths; from the first on, every number is linear
    in the depth. Where blocks are recomputed, that begins one block later: the peak lies in the backward pass, and only
    in the third block from the end does FSDP2 hold a block that is reduced beside two that are gathered. There a share
    of a percent may remain.

    Args:
        case: its `gpus` are the processes of the layout.
        layout: resolved.

    Raises:
        UserError: if the layout does not fit, or a tensor has more bytes than 64 bits can count.
    """
    depth, small = case.model.n_layers, shallow(case.model) + case.run.activation_checkpointing
    if depth <= small + 1:
        return trace_directly(case, layout)
    one, two = (trace_directly(case.with_model(n_layers=layers), layout) for layers in (small, small + 1))
    return one.deeper(two, depth - small)


def trace_directly(case: MemoryCase, layout: ParallelConfig) -> Trace:
    """Trace one process of a layout at the depth of the case; see `trace`."""
    with fake_world(case.gpus) as alone, too_large(case), kernels.use("triton" if case.has_kernels else "composed"):
        world = alone.laid_out(layout, case.model, torch.device("cpu"))
        fake = FakeTensorMode()
        with fake:
            model = fake_model(replace(case, gpus=1))
        shard_model(model, torch.bfloat16 if case.bfloat16 else None, world)  # looks at real numbers: those of the mesh
        with fake:
            return trace_step(model, case, world)


def trace_step(model: LanguageModel, case: MemoryCase, world: World) -> Trace:
    """Trace a step of a model that is cut, on fake tensors or on real ones.

    Args:
        model: cut by `sdd.train.sharding.shard_model`.
        case: the run and the micro-batch.
        world: the processes, laid out.
    """
    model.sum_counts = world.total_of_all if world.size > 1 else None
    model.checkpoint_blocks, model.chunked_loss = case.run.activation_checkpointing, case.chunked_loss
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    kept = [_local(tensor) for p in parameters for tensor in (p, p.grad) if tensor is not None]
    with CountTraffic() as in_pass, _EvenSpread(case, world), LiveBytes([*kept, *model.buffers()]) as live:
        held = run_measured(model, case, live)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimizer = build_optimizer(model, case.run.optim)
    with CountTraffic() as after, _EvenSpread(case, world):
        average_gradients(model, world)
        clip_gradients(model, case.run.optim.grad_clip)
        optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return Trace(_bytes(parameters), _bytes(gradients), _bytes(moments), held, in_pass.found, after.found)


class _EvenSpread(TorchDispatchMode):
    """Answers what a fake tensor cannot: how many rows go to each process that shares experts. Floats are 1."""

    def __init__(self, case: MemoryCase, world: World) -> None:
        super().__init__()
        layout, moe = world.layout or ParallelConfig(), case.model.moe
        rows = case.tokens // (layout.context * layout.tensor) * (1 if moe is None else moe.top_k)
        self._rows = rows // (layout.expert * layout.tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # to be called again for the tensors that it holds
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else self._rows
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_world(size: int) -> Iterator[World]:
    """Process 0 of a world that exchanges nothing; a block inside another of the same size shares its groups.

    Raises:
        UserError: if this process belongs to a real world.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        if dist.get_backend() != "fake" or dist.get_world_size() != size:
            raise UserError("a plan takes one process: leave torchrun out")
        yield World(0, size)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it knows the meshes of groups that are gone, and takes them for equal ones


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: "list[nn.Parameter] | list[Tensor]") -> int:
    return sum(_local(tensor).nbytes for tensor in tensors)


def _combined(one: Traffic, two: Traffic, number: Any) -> Traffic:
    nothing = Volume(0, 0)
    streams: list[Stream] = list(dict.fromkeys([*one, *two]))
    return {s: Volume(*map(number, one.get(s, nothing), two.get(s, nothing))) for s in streams}
