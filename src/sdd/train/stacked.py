"""Runs of one shape as one computation: their weights are stacked, and one pass computes the step of every run.

With R runs of N parameters each, every tensor has R as its first dimension:

    loss[r] = L(w[r], tokens[r])       `torch.func.vmap` of the model's own forward pass
    g[r]    = d loss[r] / d w[r]       the gradient of sum(loss), as no run reads the weights of another
    w[r]    = AdamW(w[r], g[r])        element by element on flat tensors [R, N], clipped by each run's own norm

A small model leaves most of a GPU idle, and most of its time is that of launching kernels. A stack launches as many
kernels as one run, each of which has R times the work. On a GPU the whole step is a CUDA graph as well.

Shape suffixes: R runs, N parameters, K steps, B batch, T tokens.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from sdd import kernels
from sdd.models import LanguageModel
from sdd.models.transformer import cross_entropy
from sdd.train.config import RunConfig
from sdd.train.evaluate import Evaluation, evaluation_of
from sdd.train.learner import Learner
from sdd.train.optim import optimizer_tensors
from sdd.train.schedule import learning_rate

T = TypeVar("T")
#: Steps that a GPU takes before the step is captured as a graph: compilers and libraries set themselves up in them.
_WARM_UP = 3
#: Windows of an evaluation's pass, in batches of training: it keeps nothing for a backward pass.
_EVALUATED = 4
#: Fields of the optimiser in which runs of one stack may differ: rates, their schedules, and decays.
_FREE_OPTIM = (
    *("lr", "warmup", "schedule", "final_lr", "first_lr", "decay_fraction", "alpha_lr"),
    *("weight_decay", "alpha_weight_decay", "embedding_weight_decay", "sdd_weight_decay"),
)
#: Numbers that are summed in a row.
_PIECE = 1024
#: Versions of a block that are compiled at most: one for each kind of block, and residual rules may differ by layer.
_VERSIONS = 256


def why_alone(config: RunConfig) -> str | None:
    """Why a run cannot be part of a stack, in a few words; None if it can."""
    reasons = {
        "has experts": config.model.moe is not None,
        f"is moved by {config.optim.name}": config.optim.name != "adamw",
        "keeps lengths of weights": config.weight_rule != "free",
        "masks documents": config.data.document_mask,
        "has a z-loss": config.optim.z_loss > 0,
        "cuts its batches": config.accumulate > 1,
        "recomputes activations": config.activation_checkpointing,
        "has a chunked loss": config.chunked_loss,
        "rounds statistics": config.model.statistics != "float32",
        "is probed": config.probe_every > 0,
        "writes a sample": config.sample_tokens > 0,
        "skips batches": config.guard.spikes == "skip" or config.guard.nonfinite == "skip",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def shape_of(config: RunConfig) -> RunConfig:
    """What all runs of a stack have in common: the config without seed, initial draws, schedules and decays."""
    placement = config.model.placement
    norms = {site: replace(norm, alpha_init="one", alpha_factor=1.0) for site, norm in placement.norms.items()}
    bare = replace(placement, norms=norms, name="", source="", init="base", draws={})
    model = replace(config.model, placement=bare, init_scale=1.0)
    plain: dict[str, Any] = {name: getattr(type(config.optim)(), name) for name in _FREE_OPTIM}
    return replace(config, model=model, optim=replace(config.optim, **plain), seed=0)


class Stack:
    """The weights and moments of several runs, and their common step.

    Args:
        learners: the runs, of one shape (see `shape_of`), at the same step. Their weights and moments are copied.

    Attributes:
        weights, exp_avg, exp_avg_sq: `[R, N]`, float32 as the weights are.
        parameters: views of the weights by the model's names, `[R, ...]`.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners, first = list(learners), learners[0]
        self.device, self.config, self.autocast_dtype = first.device, first.config, first.autocast_dtype
        self._shapes = {name: parameter.shape for name, parameter in first.model.named_parameters()}
        ends = list(accumulate((shape.numel() for shape in self._shapes.values()), initial=0))
        self._places = dict(zip(self._shapes, pairwise(ends), strict=True))
        size, self._dtype = (len(self.learners), ends[-1]), _widest(first.model)
        self.weights, self.exp_avg, self.exp_avg_sq, self._decay, self._factor = (
            torch.empty(size, dtype=self._dtype, device=self.device) for _ in range(5)
        )
        for run, learner in enumerate(self.learners):
            self._take(run, learner)
        self.parameters = {
            name: self.weights[:, start:end].unflatten(1, self._shapes[name]).detach().requires_grad_()
            for name, (start, end) in self._places.items()
        }
        compiled = first.config.compile is True
        self._eager, self._passes = Passes(first.model, compiled=False), Passes(first.model, compiled=compiled)
        self._adamw = torch.compile(adamw_, dynamic=False) if compiled else adamw_
        self._graph: _Graph | None = None
        self._taken = 0

    def advance(self, step: int, until: int) -> Tensor:
        """Take the steps from `step` up to `until`, both counted from 0, the last left out.

        Returns:
            `[K, 2, R]` on the device: the loss, and the norm of the gradients before clipping.
        """
        steps = range(step, until)
        tokens_KRBT = torch.stack([torch.stack([one.loader.batch(at) for one in self.learners]) for at in steps])
        numbers = [self._numbers(at) for at in steps]
        columns = (torch.tensor(column, dtype=self._dtype) for column in zip(*numbers, strict=True))
        rates_KR, corrections_K2 = (column.to(self.device) for column in columns)
        if self.device.type == "cuda":
            tokens_KRBT = tokens_KRBT.pin_memory()
        tokens_KRBT = tokens_KRBT.to(self.device, non_blocking=True)
        found = torch.empty(len(steps), 2, len(self.learners), dtype=self._dtype, device=self.device)
        for index in range(len(steps)):
            found[index] = self._step(tokens_KRBT[index], rates_KR[index], corrections_K2[index])
        return found

    def _numbers(self, step: int) -> tuple[list[float], tuple[float, float]]:
        """Each run's learning rate at a step, and what corrects the two moments for their start at zero."""
        rates = [learning_rate(one.config.optim, step + 1, one.config.steps) for one in self.learners]
        optim = self.config.optim
        return rates, (1 - optim.beta1 ** (step + 1), (1 - optim.beta2 ** (step + 1)) ** 0.5)

    def _step(self, tokens_RBT: Tensor, rates_R: Tensor, corrections: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return self._compute(tokens_RBT, rates_R, corrections)
        if self._taken < _WARM_UP:
            self._taken += 1
            return _beside(lambda: self._compute(tokens_RBT, rates_R, corrections))
        if self._graph is None:
            self._graph = _Graph(self._compute, tokens_RBT, rates_R, corrections)
        return self._graph(tokens_RBT, rates_R, corrections)

    def _compute(self, tokens_RBT: Tensor, rates_R: Tensor, corrections: Tensor) -> Tensor:
        """One step of all runs: `[2, R]`, loss and norm of the gradients."""
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            losses_R = self._passes(self.parameters, tokens_RBT)
        found = torch.autograd.grad(losses_R.sum(), list(self.parameters.values()))
        gradients_RN = torch.cat([gradient.flatten(1) for gradient in found], 1)
        optim = self.config.optim
        with torch.no_grad():
            norms_R = self._adamw(
                *(self.weights, gradients_RN, self.exp_avg, self.exp_avg_sq, self._decay, self._factor),
                *(rates_R, corrections),
                betas=(optim.beta1, optim.beta2),
                eps=optim.eps,
                clip=optim.grad_clip,
            )
        return torch.stack([losses_R.detach(), norms_R])

    @torch.no_grad()
    def largest(self) -> Tensor:
        """The largest absolute weight of each run, `[R]` on the device; not finite if one is not."""
        return torch.linalg.vector_norm(self.weights, torch.inf, dim=1)

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> list[Evaluation]:
        """The loss of every run on the same windows, int64 `[n, T + 1]`, as `evaluate` computes it of one."""
        first, total = self.learners[0], torch.zeros(len(self.learners), dtype=torch.float64, device=self.device)
        for rows in windows.split(_EVALUATED * self.config.data.batch_size):
            tokens_RBT = rows.to(self.device).expand(len(self.learners), *rows.shape)
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                total += self._eager(self.parameters, tokens_RBT, reduction="none").double().sum((1, 2))
        return [evaluation_of(nll, windows, first.token_bytes) for nll in total.tolist()]

    @torch.no_grad()
    def _take(self, run: int, learner: Learner) -> None:
        """Copy the weights, moments and decays of a run into its row."""
        state = optimizer_tensors(learner.optimizer)
        for group in learner.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                place = run, slice(*self._places[name])
                self.weights[place] = parameter.flatten()
                self.exp_avg[place] = state[f"{name}.exp_avg"].flatten()
                self.exp_avg_sq[place] = state[f"{name}.exp_avg_sq"].flatten()
                self._decay[place] = group["weight_decay"]
                self._factor[place] = group.get("lr_factor", 1.0)
        learner.optimizer.state.clear()

    @torch.no_grad()
    def give_back(self, run: int, step: int) -> None:
        """Copy the weights and moments of a run into its learner, which stands at `step` then."""
        learner = self.learners[run]
        state = optimizer_tensors(learner.optimizer)
        for name, parameter in learner.model.named_parameters():
            place, shape = (run, slice(*self._places[name])), self._shapes[name]
            parameter.copy_(self.weights[place].view(shape))
            state[f"{name}.exp_avg"].copy_(self.exp_avg[place].view(shape))
            state[f"{name}.exp_avg_sq"].copy_(self.exp_avg_sq[place].view(shape))
            state[f"{name}.step"].fill_(step)


def adamw_(
    weights: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    decay: Tensor,
    factor: Tensor,
    rates: Tensor,
    corrections: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    clip: float,
) -> Tensor:
    """AdamW of several runs in place, after each run's gradients were clipped to the norm `clip`.

    Args:
        weights: `[R, N]`.
        gradients: `[R, N]`.
        exp_avg: the first moment, `[R, N]`.
        exp_avg_sq: the second moment, `[R, N]`.
        decay: weight decay of each element, `[R, N]`.
        factor: multiplies the rate of each element, `[R, N]`.
        rates: learning rates, `[R]`.
        corrections: `1 - beta1^t` and `sqrt(1 - beta2^t)`, `[2]`.
        betas: of AdamW.
        eps: of AdamW.
        clip: 0 leaves the gradients as they are.

    Returns:
        The norm of each run's gradients before clipping, `[R]`.
    """
    norms = _norms(gradients)
    if clip:
        gradients = gradients * (clip / (norms + 1e-6)).clamp(max=1.0)[:, None]  # as torch's clip_grad_norm_
    steps = rates[:, None] * factor
    exp_avg.lerp_(gradients, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradients, gradients, value=1 - betas[1])
    root = exp_avg_sq.sqrt() / corrections[1] + eps
    weights.mul_(1 - steps * decay).sub_(steps / corrections[0] * exp_avg / root)
    return norms


def _widest(model: nn.Module) -> torch.dtype:
    """The dtype that holds every weight of a model."""
    return reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})


def _norms(x: Tensor) -> Tensor:
    """The norm of each row of `[R, N]`, summed piece by piece: one float32 sum over millions loses digits on a CPU."""
    whole = x.shape[1] // _PIECE * _PIECE
    pieces = torch.linalg.vector_norm(x[:, :whole].unflatten(1, (-1, _PIECE)), dim=2)
    rest = torch.linalg.vector_norm(x[:, whole:], dim=1, keepdim=True)
    return torch.linalg.vector_norm(torch.cat([pieces, rest], 1), dim=1)


class Passes:
    """The loss of every run on its own tokens: the parts of one model, called with stacked weights.

    Args:
        model: any of the runs' models: its modules are called, not its weights.
        compiled: compile each kind of block once, instead of the whole model.
    """

    def __init__(self, model: LanguageModel, *, compiled: bool) -> None:
        self._blocks = list(model.blocks)
        self._rope = model.rope_cos, model.rope_sin
        self._begin, self._end = _Begin(model), _End(model)
        self._compiled = compiled
        self._call = torch.compile(_call, dynamic=False) if compiled else _call

    def __call__(self, parameters: Mapping[str, Tensor], tokens_RBT: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats a token: `[R]`, or with reduction "none" `[R, B, T]`."""
        with kernels.use("composed"), _one_by_one(), _many_versions() if self._compiled else nullcontext():
            outer = {f"model.{name}": value for name, value in parameters.items() if not name.startswith("blocks.")}
            x_RBTC = self._call(self._begin, outer, tokens_RBT[..., :-1])
            for number, block in enumerate(self._blocks):
                x_RBTC = self._call(block, _below(parameters, f"blocks.{number}."), x_RBTC, rest=(self._rope,))[0]
            return self._call(self._end, outer, x_RBTC, tokens_RBT[..., 1:], rest=(reduction,))


def _call(module: nn.Module, parameters: dict[str, Tensor], *stacked: Tensor, rest: tuple[Any, ...] = ()) -> Any:
    """Call a module with the weights and inputs of each run; `rest` is the same for all."""

    def one(parameters: dict[str, Tensor], *inputs: Tensor) -> Any:
        output = functional_call(module, parameters, (*inputs, *rest))
        return output[:1] if isinstance(output, tuple) else output  # a block's routing is None, which is no tensor

    return vmap(one)(parameters, *stacked)


class _Begin(nn.Module):
    """Embedding and its norm."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.model.embed_norm(self.model.embed(tokens_BT))


class _End(nn.Module):
    """The norm before the head, the head and the loss."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BTC: Tensor, targets_BT: Tensor, reduction: str) -> Tensor:
        return cross_entropy(self.model.final_norm(x_BTC), self.model.head_weight, targets_BT, reduction=reduction)[0]


def _many_versions() -> AbstractContextManager[Any]:
    """Let as many kinds of blocks be compiled as there are, and fail rather than leave one eager in silence."""
    return torch._dynamo.config.patch(recompile_limit=_VERSIONS, fail_on_recompile_limit_hit=True)


def _below(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


@contextmanager
def _one_by_one() -> Iterator[None]:
    """A CPU's attention has no batched form in vmap, which then computes one run after the other, and warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not yet implemented the batching rule.*")
        yield


class _Graph:
    """A function of tensors on a GPU as a CUDA graph: captured once, then replayed without Python in between."""

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self._inputs = [one.clone() for one in inputs]
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output


def _beside(function: Callable[[], Tensor]) -> Tensor:
    """Call a function on a stream of its own, as what is captured later asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = function()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def stacks(runs: Sequence[T], config: Callable[[T], RunConfig], most: int) -> list[list[T]]:
    """Sort runs into stacks of at most `most`; a run that cannot be part of one is a list of its own.

    Args:
        runs: in their order, which stacks keep.
        config: of a run.
        most: runs of a stack.
    """
    found: list[tuple[RunConfig, list[T]]] = []
    for run in runs:
        own = config(run)
        shape = shape_of(own)
        open_ = (stack for kind, stack in found if kind == shape and len(stack) < most and not why_alone(own))
        if (fitting := next(open_, None)) is None:
            found.append((shape, [run]))
        else:
            fitting.append(run)
    return [stack for _, stack in found]
