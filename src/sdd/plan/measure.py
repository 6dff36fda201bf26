"""Bytes that a forward and backward pass holds, measured on the real model without its numbers.

The model runs on fake tensors, which have a shape, a dtype and a storage of known size but no numbers. A model of any
size takes about a second, and each of its operations keeps, allocates and frees what it does in training. Fake tensors
stand on the CPU, where the fused kernels and the flash attention of a GPU are forced.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sdd import kernels
from sdd.errors import UserError
from sdd.kernels.dispatch import HAS_TRITON
from sdd.models import LanguageModel, ModelConfig
from sdd.models.documents import flex_attends
from sdd.models.transformer import HAS_CHUNKED_LOSS
from sdd.optim_groups import param_groups
from sdd.train import RunConfig


@dataclass(frozen=True)
class MemoryCase:
    """Settings that memory depends on.

    Attributes:
        run: the run; its precision "auto" is bfloat16.
        gpus: number of GPUs, N.
        micro_batch: sequences that one GPU has in memory at once.
    """

    run: RunConfig
    gpus: int = 1
    micro_batch: int = 1

    @property
    def model(self) -> ModelConfig:
        """Shape, placement, and the length of a sequence."""
        return self.run.model

    @property
    def tokens(self) -> int:
        """Tokens that one GPU has in memory at once."""
        return self.micro_batch * self.model.context

    @property
    def bfloat16(self) -> bool:
        """Whether matrix products run in bfloat16, by autocast; else in float32."""
        return self.run.precision != "float32"

    @property
    def chunked_loss(self) -> bool:
        """Whether the loss runs in chunks of the logits: by the run's choice, and where this torch has it."""
        return self.run.chunked_loss and HAS_CHUNKED_LOSS

    @property
    def has_kernels(self) -> bool:
        """Whether norms are measured as fused kernels, which every GPU with Triton runs; else as composed."""
        return HAS_TRITON

    @property
    def has_flex_attention(self) -> bool:
        """Whether attention stops at documents by flex attention, which keeps what flash attention keeps."""
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        fits = flex_attends(self.model.context, self.model.head_dim, dtype)
        return self.run.data.document_mask and self.has_kernels and fits

    @property
    def has_fused_attention(self) -> bool:
        """Whether torch has a fused kernel on GPUs: with grouped heads flex, or flash for bfloat16 without a mask."""
        grouped = self.model.n_kv_heads != self.model.n_heads
        return not grouped or self.has_flex_attention or (self.bfloat16 and not self.run.data.document_mask)

    def with_model(self, **changes: Any) -> "MemoryCase":
        """The same case with another model."""
        return replace(self, run=replace(self.run, model=replace(self.model, **changes)))


class PassMemory(NamedTuple):
    """Bytes of one forward and backward pass, beside weights and their gradients.

    `activations` and `copies` are held between the two passes; the others are the most at once in each phase.

    Attributes:
        activations: kept for the backward pass, by all but the loss.
        copies: weights as matrix products read them.
        embedding_forward, blocks_forward, loss_forward: the final norm belongs to the blocks, the head to the loss.
        loss_backward, blocks_backward, embedding_backward: the same phases in return.
    """

    activations: int
    copies: int
    embedding_forward: int
    blocks_forward: int
    loss_forward: int
    loss_backward: int
    blocks_backward: int
    embedding_backward: int


def measure_pass(case: MemoryCase) -> PassMemory:
    """Measure a pass of one GPU.

    Blocks of a kind are alike, so a deep model is measured at two small depths. Each number is linear in the depth.

    Raises:
        UserError: if a tensor has more bytes than 64 bits can count.
    """
    depth, small = case.model.n_layers, shallow(case.model)
    if depth <= small + 1:
        return measure_directly(case)
    one, two = (measure_directly(case.with_model(n_layers=layers)) for layers in (small, small + 1))
    return PassMemory(*(b + (depth - small - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def shallow(model: ModelConfig) -> int:
    """The depth from which on each further block adds the same: blocks at either end that differ, and some alike."""
    overrides = model.placement.overrides
    alike = 2 if model.moe is None else 3  # from two, mixtures of experts are off by some bytes more often
    return alike + max([0, *(1 + index for index in overrides)]) + max([0, *(-index for index in overrides)])


def measure_directly(case: MemoryCase) -> PassMemory:
    """Measure a pass of one GPU at the depth of the case.

    Raises:
        UserError: as `measure_pass`.
    """
    with too_large(case), FakeTensorMode(), kernels.use("triton" if case.has_kernels else "composed"):
        return run_pass(fake_model(case), case)


@contextmanager
def too_large(case: MemoryCase) -> Iterator[None]:
    """Context in which sizes that 64 bits cannot count are a user's mistake."""
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(
            f"{case.micro_batch:,} sequences of {case.model.context:,} tokens are too large to plan: "
            "give a smaller --micro-batch or --context"
        ) from None


def run_pass(model: LanguageModel, case: MemoryCase) -> PassMemory:
    """Run a forward and backward pass of a model, on fake tensors or on real ones, and count what it holds.

    All gradients are there from an earlier micro-batch, on several GPUs as shards.
    """
    run, weights = case.run, list(model.parameters())
    model.checkpoint_blocks, model.chunked_loss = run.activation_checkpointing, case.chunked_loss
    if case.gpus > 1:
        _reduce_as_fsdp(model)
    else:
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    with LiveBytes([*weights, *model.buffers(), *gradients]) as memory:
        return run_measured(model, case, memory)


def run_measured(model: LanguageModel, case: MemoryCase, memory: "LiveBytes") -> PassMemory:
    """Run a forward and backward pass inside a `LiveBytes` block; see `run_pass`."""
    run = case.run
    backend = SDPBackend.FLASH_ATTENTION if case.has_fused_attention else SDPBackend.MATH
    with sdpa_kernel(backend):
        for module in (model.embed_norm, model.final_norm):
            module.register_forward_hook(memory.end_phase_at)
        tokens = torch.zeros(case.micro_batch, case.model.context + 1, dtype=torch.int64)
        # flex attention has no [T, T] mask: flash attention stands for it, and its blocks of 128 tokens are not counted
        eos = 0 if run.data.document_mask and not case.has_flex_attention else None
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:], z_loss=run.optim.z_loss, document_eos=eos)
        memory.end_phase()
        held = memory.held(before_phase=2)
        loss.backward()
        memory.end_phase()
    return PassMemory(*held, *memory.peaks)


def fake_model(case: MemoryCase) -> LanguageModel:
    """The model on the CPU, under a fake tensor mode.

    On several GPUs, blocks compute with matrices that FSDP2 has gathered in the dtype of autocast.
    """
    model = LanguageModel(case.model, "meta")
    gathered = _sharded(model) if case.gpus > 1 and case.bfloat16 else ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        dtype = torch.bfloat16 if name in gathered and name.startswith("blocks.") else tensor.dtype
        # one by one: `to_empty` cannot move fake tensors to another device
        empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, nn.Parameter(empty) if tensor.requires_grad else empty)
    return model


def _sharded(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that FSDP2 shards, by name; see `sdd.train.sharding`."""
    groups = [group for group in param_groups(model) if group["role"] in ("matrix", "embedding")]
    return {name: weight for group in groups for name, weight in zip(group["names"], group["params"], strict=True)}


def _reduce_as_fsdp(model: LanguageModel) -> None:
    """Hold whole gradients of sharded weights as long as FSDP2 does.

    When a block has all its gradients, they are copied to float32 and freed; the copy stays until the next block's is
    made. Gradients of embedding and head stay to the end.
    """
    copies: list[Tensor] = []

    def reduce(_: Tensor, weights: Iterable[Tensor]) -> None:
        if all(weight.grad is not None for weight in weights):
            copies[:] = [torch.empty(sum(weight.numel() for weight in weights))]
            for weight in weights:
                weight.grad = None

    for block in model.blocks:
        weights = _sharded(block).values()
        for weight in weights:
            weight.register_post_accumulate_grad_hook(partial(reduce, weights=weights))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the block allocate, while they live.

    Args:
        weights: tensors that are not counted.

    Attributes:
        peaks: the most bytes at once, one number for each phase that has ended.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.peaks: list[int] = []
        self._now = self._peak = 0
        self._live: dict[int, tuple[int, int]] = {}  # by address: bytes, and the phase that allocated them
        self._of_weights = {storage._cdata for storage in _storages(list(weights))}  # weights, and copies of them
        self._resized: dict[int, torch.UntypedStorage] = {}  # into which FSDP2 gathers weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # to be called again for the tensors that it holds
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # two calls of three: a fake tensor is asked where it stands
            return result
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        self._measure_again()
        gathers = func is torch.ops.aten.empty.memory_format and _in_call("init_all_gather_outputs")
        for storage in _storages(result):
            self._count(storage, gathers or (bool(inputs) and inputs <= self._of_weights))
            if gathers:
                self._resized[storage._cdata] = storage
        return result

    def end_phase(self) -> None:
        """End a phase and begin the next."""
        self.peaks.append(self._peak)
        self._peak = self._now

    def end_phase_at(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """A forward hook: ends a phase where a module's output is computed, and one where its gradient is."""
        self.end_phase()
        output.register_hook(lambda gradient: self.end_phase())

    def held(self, before_phase: int) -> tuple[int, int]:
        """Bytes of activations and of copies of weights that are held now and were allocated before a phase."""
        sizes = {address: size for address, (size, phase) in self._live.items() if phase < before_phase}
        copies = sum(size for address, size in sizes.items() if address in self._of_weights)
        return sum(sizes.values()) - copies, copies

    def _count(self, storage: torch.UntypedStorage, of_weights: bool) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._live or address in self._of_weights:
            return
        self._live[address] = size, len(self.peaks)
        if of_weights:
            self._of_weights.add(address)
        self._now += size
        self._peak = max(self._peak, self._now)
        finalize(storage, self._free, address)

    def _measure_again(self) -> None:
        for address, storage in self._resized.items():
            size, phase = self._live[address]
            if (now := storage.nbytes()) != size:
                self._live[address] = now, phase
                self._now += now - size
        self._peak = max(self._peak, self._now)

    def _free(self, address: int) -> None:
        self._of_weights.discard(address)
        self._now -= self._live.pop(address)[0]


def _in_call(name: str) -> bool:
    """Whether a function of that name is being called."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


def _storages(tree: object) -> Iterable[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
