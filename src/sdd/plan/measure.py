"""Bytes that a forward and backward pass holds, measured on the real model without its numbers.

The model runs on fake tensors, which have a shape, a dtype and a storage of known size but no numbers. A model of any
size takes about a second, and each of its operations keeps, allocates and frees what it does in training. Fake tensors
stand on the CPU, where the fused kernels and the flash attention of a GPU are forced.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sdd import kernels
from sdd.errors import UserError
from sdd.kernels.dispatch import HAS_TRITON
from sdd.models import LanguageModel, ModelConfig
from sdd.optim_groups import param_groups
from sdd.train import RunConfig


@dataclass(frozen=True)
class MemoryCase:
    """Settings that memory depends on.

    Attributes:
        model: shape, placement, and the length of a sequence.
        gpus: number of GPUs, N.
        micro_batch: sequences that one GPU has in memory at once.
        bfloat16: autocast; else float32.
        checkpoint_blocks: recompute each block in the backward pass.
        chunked_loss: never hold all logits.
        z_loss: whether the loss has that term.
        document_mask: whether attention gets a mask.
    """

    model: ModelConfig
    gpus: int = 1
    micro_batch: int = 1
    bfloat16: bool = True
    checkpoint_blocks: bool = False
    chunked_loss: bool = False
    z_loss: bool = False
    document_mask: bool = False

    @classmethod
    def of(cls, run: RunConfig, gpus: int, micro_batch: int) -> "MemoryCase":
        """The case of a run on GPUs, where precision "auto" is bfloat16."""
        return cls(
            run.model,
            gpus,
            micro_batch,
            bfloat16=run.precision != "float32",
            checkpoint_blocks=run.activation_checkpointing,
            chunked_loss=run.chunked_loss,
            z_loss=run.optim.z_loss > 0,
            document_mask=run.data.document_mask,
        )

    @property
    def tokens(self) -> int:
        """Tokens that one GPU has in memory at once."""
        return self.micro_batch * self.model.context

    @property
    def has_kernels(self) -> bool:
        """Whether norms are measured as fused kernels, which every GPU with Triton runs; else as composed."""
        return HAS_TRITON

    @property
    def has_fused_attention(self) -> bool:
        """Whether torch has a fused kernel on GPUs: with grouped heads only its flash kernel, bfloat16 and no mask."""
        grouped = self.model.n_kv_heads != self.model.n_heads
        return not grouped or (self.bfloat16 and not self.document_mask)


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
    depth = case.model.n_layers
    overrides = case.model.placement.overrides
    # those blocks at either end that differ from the others, and three that do not
    small = 3 + max([0, *(1 + index for index in overrides)]) + max([0, *(-index for index in overrides)])
    if depth <= small + 1:
        return measure_directly(case)
    one, two = (
        measure_directly(replace(case, model=replace(case.model, n_layers=layers))) for layers in (small, small + 1)
    )
    return PassMemory(*(b + (depth - small - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def measure_directly(case: MemoryCase) -> PassMemory:
    """Measure a pass of one GPU at the depth of the case.

    Raises:
        UserError: as `measure_pass`.
    """
    try:
        with FakeTensorMode(), kernels.use("triton" if case.has_kernels else "composed"):
            return run_pass(_fake_model(case), case)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(
            f"{case.micro_batch:,} sequences of {case.model.context:,} tokens are too large to plan: "
            "give a smaller --micro-batch or --context"
        ) from None


def run_pass(model: LanguageModel, case: MemoryCase) -> PassMemory:
    """Run a forward and backward pass of a model, on fake tensors or on real ones, and count what it holds.

    Gradients of an earlier micro-batch are there already, but not those that FSDP2 gathers anew in each pass.
    """
    model.checkpoint_blocks, model.chunked_loss = case.checkpoint_blocks, case.chunked_loss
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    if case.gpus > 1:
        _reduce_as_fsdp(model)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    backend = SDPBackend.FLASH_ATTENTION if case.has_fused_attention else SDPBackend.MATH
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as memory, sdpa_kernel(backend):
        phases = [_PhaseEnd(memory, module) for module in (model.embed_norm, model.final_norm)]
        tokens = torch.zeros(case.micro_batch, case.model.context + 1, dtype=torch.int64)
        eos = 0 if case.document_mask else None
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:], z_loss=float(case.z_loss), document_eos=eos)
        memory.end_phase()
        held = memory.held(before=phases[-1].allocated)
        loss.backward()
        memory.end_phase()
    return PassMemory(*held, *memory.peaks)


class _PhaseEnd:
    """Ends a phase where a module's output is computed, and one where its gradient is."""

    def __init__(self, memory: "LiveBytes", module: nn.Module) -> None:
        self.memory = memory
        self.allocated = 0
        self._hook = module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._hook.remove()
        self.allocated = self.memory.end_phase()
        output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.memory.end_phase()


def _fake_model(case: MemoryCase) -> LanguageModel:
    """The model with parameters and buffers on the CPU, under a fake tensor mode.

    On several GPUs, blocks compute with matrices that FSDP2 has gathered in the dtype of autocast.
    """
    model = LanguageModel(case.model, "meta")
    gathered = {name for name, _ in _sharded(model)} if case.gpus > 1 and case.bfloat16 else set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # by hand: `to_empty` cannot move fake tensors to another device
        module, _, own_name = name.rpartition(".")
        in_block = name.startswith("blocks.")
        dtype = torch.bfloat16 if name in gathered and in_block else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        setattr(model.get_submodule(module), own_name, nn.Parameter(empty) if tensor.requires_grad else empty)
    return model


def _sharded(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that FSDP2 shards, see `sdd.train.sharding`."""
    groups = [group for group in param_groups(model) if group["role"] in ("matrix", "embedding")]
    return [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]


def _reduce_as_fsdp(model: LanguageModel) -> None:
    """Hold whole gradients as long as FSDP2 does.

    When a block has all its gradients, they are copied to float32 and freed. The copy stays until the next block's is
    made. Gradients of embedding and head stay to the end.
    """
    copies: list[Tensor] = []
    for _, weight in _sharded(model):
        weight.grad = None
    for block in model.blocks:
        weights = [weight for _, weight in _sharded(block)]
        for weight in weights:
            weight.register_post_accumulate_grad_hook(partial(_reduce, weights=weights, copies=copies))


def _reduce(_: Tensor, weights: list[nn.Parameter], copies: list[Tensor]) -> None:
    if all(weight.grad is not None for weight in weights):
        copies.clear()
        copies.append(torch.empty(sum(weight.numel() for weight in weights)))
        for weight in weights:
            weight.grad = None


class _Storage(NamedTuple):
    size: int
    number: int
    of_weights: bool


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the block allocate, while they live.

    Args:
        weights: tensors that are not counted.

    Attributes:
        now: bytes at the moment.
        peaks: the most at once in each phase, see `end_phase`.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peaks: list[int] = []
        self._peak = 0
        self._weights = {_address(weight) for weight in weights}
        self._live: dict[int, _Storage] = {}
        self._numbers = count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [_address(tensor) for tensor in _tensors((args, kwargs))]
        of_weights = bool(inputs) and all(map(self._is_of_weights, inputs))
        for tensor in _tensors(result):
            self._count(tensor.untyped_storage(), of_weights)
        return result

    def end_phase(self) -> int:
        """Add the peak since the last call to `peaks`; returns how many storages were allocated so far."""
        self.peaks.append(self._peak)
        self._peak = self.now
        return next(self._numbers)

    def held(self, before: int) -> tuple[int, int]:
        """Bytes that the first `before` storages hold now: activations, and copies of weights."""
        early = [storage for storage in self._live.values() if storage.number < before]
        copies = sum(storage.size for storage in early if storage.of_weights)
        return sum(storage.size for storage in early) - copies, copies

    def _is_of_weights(self, address: int) -> bool:
        return address in self._weights or (address in self._live and self._live[address].of_weights)

    def _count(self, storage: torch.UntypedStorage, of_weights: bool) -> None:
        address = storage._cdata
        if address in self._weights or address in self._live:
            return
        self._live[address] = _Storage(storage.nbytes(), next(self._numbers), of_weights)
        self.now += storage.nbytes()
        self._peak = max(self._peak, self.now)
        finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        self.now -= self._live.pop(address).size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
