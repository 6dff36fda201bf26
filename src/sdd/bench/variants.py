"""The variants of `sdd bench step-time`: a placement in one mode, as a whole model or as one block alone.

All variants share one set of matrices with their AdamW moments, since no time depends on the numbers. So a dozen models
of a billion parameters fit into the memory of one.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdd import functional as sdd_F
from sdd import kernels
from sdd.bench.timing import OUT_OF_MEMORY, free, runs_out_of_memory, wait, wall_seconds
from sdd.errors import UserError
from sdd.models import LanguageModel, ModelConfig
from sdd.models.flops import training_flops
from sdd.models.lean import LeanBlock
from sdd.train import OptimConfig
from sdd.train.config_io import with_placement
from sdd.train.optim import build_optimizer, clip_gradients, optimizer_tensors
from sdd.train.weights import WeightRule

Mode = Literal["eager", "compiled"]
#: Marks a placement as people compose it: every norm a module of its own, none left out, no kernel.
COMPOSED = "composed"


@dataclass
class Setting:
    """The settings that all variants of a shape share.

    Attributes:
        shape: shape of the models; its placement does not matter.
        block: whether to run one block alone, not a whole model.
        batch: sequences of a step.
        device: the device.
        dtype: dtype of autocast, None for float32.
    """

    shape: ModelConfig
    block: bool
    batch: int
    device: torch.device
    dtype: torch.dtype | None

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.shape.context

    def autocast(self) -> Any:
        """A context in the precision of the forward pass."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()


@dataclass
class Variant:
    """One placement in one mode.

    Attributes:
        name: name of the placement, `NAME+composed` for its composition.
        mode: eager or compiled.
        run: runs one step.
        resident: bytes held between steps.
        flops: FLOPs per token, as MFU counts them.
        clean: frees the gradients of a broken step.
        failed: the reason why there are no times.
        seconds: time of each round.
        peak_bytes: peak of a step, without the memory of other variants.
    """

    name: str
    mode: Mode
    run: Callable[[], Any]
    resident: int
    flops: int
    clean: Callable[[], Any]
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def turn(self, device: torch.device) -> None:
        """Run and time one step."""
        self.attempt(lambda: self.seconds.append(wall_seconds(self.run, device)), device)

    def warm_up(self, device: torch.device, steps: int = 2) -> None:
        """Run untimed steps, in which a mode compiles, and one that measures memory."""

        def steps_and_peak() -> None:
            for _ in range(steps):
                self.run()
            self.peak_bytes = self.resident + memory_growth(self.run, device)

        self.attempt(steps_and_peak, device)

    def attempt(self, call: Callable[[], Any], device: torch.device) -> None:
        """Call, unless an earlier call ran out of memory; if this one does, free its memory and record the failure."""
        if not self.failed and runs_out_of_memory(call):
            self.failed = OUT_OF_MEMORY
            self.seconds.clear()
            self.peak_bytes = None
            self.clean()
            free(device)


def build(setting: Setting, names: list[str], modes: list[Mode]) -> list[Variant]:
    """The variants of one shape, name by name, each in every mode."""
    found: list[Variant] = []
    first: nn.Module | None = None
    moments: torch.optim.Optimizer | None = None
    for name in names:
        config = configured(name, setting.shape)
        path: kernels.Path = "composed" if is_composed(name) else "auto"
        torch.manual_seed(0)
        if setting.block:
            net: nn.Module = LeanBlock(config, min(1, config.n_layers - 1), setting.device)
            share_matrices(net, first or net)
            step, held, clean = block_step(net, setting)
        else:
            net = LanguageModel(config, setting.device)
            share_matrices(net, first or net)
            optimizer = build_optimizer(net, OptimConfig())
            share_moments(optimizer, moments or optimizer)
            moments = moments or optimizer
            step, held, clean = model_step(net, optimizer, setting)
        first = first or net
        flops = block_flops(config) if setting.block else training_flops(config).model
        for mode in modes:
            call = torch.compile(net) if mode == "compiled" else net
            found.append(Variant(name, mode, on_path(path, step, call), held, flops, clean))
    return found


def is_composed(name: str) -> bool:
    """Whether a variant is the composition of its placement."""
    return "+" in name


def configured(name: str, shape: ModelConfig) -> ModelConfig:
    """The shape with the placement of a variant.

    Raises:
        UserError: if no variant has that name, or its placement does not fit the shape.
    """
    placement, plus, suffix = name.partition("+")
    if plus and suffix != COMPOSED:
        raise UserError(f"no variant {name!r}: after a placement only +{COMPOSED} can stand")
    return replace(with_placement(shape, placement), eliminate_norms=not plus)


def share_matrices(net: nn.Module, first: nn.Module) -> None:
    """Replace matrices by those of the same name and shape in `first`."""
    theirs = dict(first.named_parameters())
    for name, parameter in list(net.named_parameters()):
        twin = theirs.get(name)
        if twin is not None and twin.ndim > 1 and twin.shape == parameter.shape:
            owner, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(owner), leaf, twin)


def share_moments(optimizer: torch.optim.Optimizer, first: torch.optim.Optimizer) -> None:
    """Use the state of `first` for the parameters that both optimizers hold."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in first.state:
                optimizer.state[parameter] = first.state[parameter]
    optimizer_tensors(optimizer)


Step = tuple[Callable[[Any], Any], int, Callable[[], Any]]


def model_step(model: LanguageModel, optimizer: torch.optim.Optimizer, setting: Setting) -> Step:
    """A step of forward, backward, clipping and AdamW; the bytes held between steps; a call that frees gradients."""
    shape = setting.batch, setting.shape.context + 1
    tokens = torch.randint(0, setting.shape.vocab_size, shape, device=setting.device)
    rule = WeightRule(model, optimizer, model.config.placement.weights)

    def step(call: Any) -> None:
        with setting.autocast():
            loss = call(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        clip_gradients(model, 1.0)
        rule.step()
        optimizer.zero_grad()

    held = [tokens, *model.parameters(), *model.buffers(), *optimizer_tensors(optimizer).values()]
    return step, n_bytes(held), optimizer.zero_grad


def block_step(block: nn.Module, setting: Setting) -> Step:
    """A forward and backward pass of one block, to the gradients of its input and parameters; the rest as above."""
    config = setting.shape
    x = torch.randn(setting.batch, config.context, config.d_model, device=setting.device, requires_grad=True)
    dy = torch.randn_like(x)
    rope = sdd_F.rope_tables(config.context, config.head_dim, config.rope_theta, setting.device)
    wanted = [x, *block.parameters()]

    def step(call: Any) -> None:
        with setting.autocast():
            y, _ = call(x, rope)
        torch.autograd.grad(y, wanted, dy.to(y.dtype))

    return step, n_bytes([*wanted, dy, *rope]), lambda: None


def on_path(path: kernels.Path, step: Callable[[Any], Any], call: Any) -> Callable[[], Any]:
    """A step of `call` by one path of the kernels."""

    def run() -> None:
        with kernels.use(path):
            step(call)

    return run


def block_flops(config: ModelConfig) -> int:
    """FLOPs per token of a block alone: those of `training_flops` without the head."""
    return training_flops(replace(config, n_layers=1)).model - 6 * config.vocab_size * config.d_model


def n_bytes(tensors: list[Tensor]) -> int:
    """Bytes of all tensors, shared storage counted once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def memory_growth(run: Callable[[], Any], device: torch.device) -> int:
    """The largest growth of allocated memory during a call, in bytes."""
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    # acc_events: without it torch 2.11 warns, although there is only one cycle
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = [event for event in results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)
