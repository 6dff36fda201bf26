r"""Calibration: the alpha with which an SDD layer comes nearest to the trained linear layer that it replaces.

With the matrix W of a trained layer kept as V, bit for bit, and its bias b kept, each output i has one number to fit.
Over tokens t, with x the input in the converted model and x* that in the original one,

    n(t) = norm(W x(t)),    u(t) = W x*(t),    w(t) = 1 / mean(u(t)^2)

    alpha_i = sum_t w(t) n_i(t) u_i(t) / sum_t w(t) n_i(t)^2

is the least-squares solution of `alpha * norm(V x) + b = W x* + b`. The weight w makes all tokens count alike: without
it, a few tokens with huge outputs (attention sinks) decide alone. With norm groups, mean squares are those of a group.

Where x = x*, the error of a token is how far its own scale is from the common one: a norm erases the magnitude, and no
alpha brings it back. Stacked experts have an alpha for each expert; see `sdd.conversion.expert_fits`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.closed_form import (
    Norms,
    closed_form,
    counted_rows,
    has_size,
    median,
    outliers,
    token_errors,
    token_mask,
)
from sdd.conversion.expert_fits import Stack, StackCalibration, StackFitting
from sdd.conversion.lockstep import RefusedBatch, Stop, Visit, in_lockstep
from sdd.errors import UserError, one_line
from sdd.functional import scaled_norm


@dataclass(frozen=True)
class Fit:
    """A layer's alpha and how near it comes.

    Attributes:
        alpha: float32, on the layer's device; of stacked experts, `[experts, out_features]`, at least float32.
        error: median over tokens of `|alpha norm(V x) - W x*| / |W x*|`: against the original model, errors of the
            converted layers before it included.
        inherited: the same of the plain layer, `|W x - W x*| / |W x*|`: what the layers before it cause alone.
        tokens: their number; of stacked experts, that of pairs of a token and an expert.
        outliers: tokens of the original model whose rms is over 10 times the median, or under a tenth of it.
        stays: whether the error is beyond the limit, so that the layer stays plain.
        few: of stacked experts, those that too few tokens were sent to, see `sdd.conversion.expert_fits`.
    """

    alpha: Tensor
    error: float
    inherited: float
    tokens: int
    outliers: int = 0
    stays: bool = False
    few: tuple[int, ...] = ()


def fit_alphas(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    norms: Mapping[str, Norms],
    batches: Iterable[Any],
    max_error: float | None = None,
    stacks: Mapping[str, Stack] | None = None,
) -> dict[str, Fit]:
    """Fit the alpha of each layer, in the order in which they are called; the model is not changed.

    Inputs are those of the converted prefix: where a layer is reached, all earlier ones already put out what they will
    as SDD layers. Targets are the original model's. Both run together, see `sdd.conversion.lockstep`.

    Args:
        model: the trained model.
        linears: the layers by name, in the model's order.
        norms: the norm of each.
        batches: examples: a tensor, a tuple or list of arguments, or a mapping of keyword arguments. Where a mapping
            has an `attention_mask` `[B, T]`, tokens that it leaves out do not count.
        max_error: a layer whose error exceeds it stays plain, and later layers see its true outputs; None for no limit.
        stacks: modules of stacked experts by name.

    Returns:
        The fits by name of the layer, or of the stacked matrices; what no batch reaches is not among them.

    Raises:
        UserError: if there are no batches, if the model refuses one, or if an output is not finite.
    """
    examples, stacks = as_batches(batches), stacks or {}
    masks = [token_mask(batch) for batch in examples]
    fitting = _Calibration(linears, norms, masks, max_error)
    experts = StackCalibration(stacks, masks, max_error)
    fit_together(model, fitting, linears, experts, stacks, examples)
    few, fits = experts.fewer(), {}
    for one in (fitting, experts):
        errors, inherited, tokens = one.errors(), one.inherited(), one.tokens()
        for name in errors:
            alpha = one.alpha(name)
            stays, outside = name in one.stays, one.outliers[name]
            fits[name] = Fit(alpha, errors[name], inherited[name], tokens[name], outside, stays, few.get(name, ()))
    return fits


def fit_together(
    model: nn.Module,
    fitting: "Fitting",
    layers: Mapping[str, nn.Module],
    experts: StackFitting,
    stacks: Mapping[str, Stack],
    batches: Sequence[Any],
) -> None:
    """Fit layers and stacked experts in one run of the batches, see `run_batches`."""
    modules = {**layers, **{name: stack.module for name, stack in stacks.items()}}

    def visit(name: str, stops: Mapping[int, Stop]) -> Mapping[int, Tensor]:
        return (experts if name in stacks else fitting).visit(name, stops)

    run_batches(model, modules, batches, visit, twice=True)


def as_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list.

    Raises:
        UserError: if they are none, or one example instead of several.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise UserError(f"batches is one {type(batches).__name__}: give a list of examples, as in batches=[batch]")
    found = list(batches)
    if not found:
        raise UserError("batches is empty: give a few examples of what the model was trained on")
    return found


def run_batches(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], visit: Visit, *, twice: bool = False
) -> None:
    """Run the batches in lockstep, each of them twice if asked to, and say which one the model refuses.

    Raises:
        UserError: if the model refuses a batch, or `visit` raises one.
    """
    places = {module: place for place, module in enumerate(model.modules())}
    layers = dict(sorted(layers.items(), key=lambda item: places[item[1]]))
    try:
        in_lockstep(model, layers, [*batches, *batches] if twice else batches, visit)
    except RefusedBatch as error:
        cause = error.__cause__
        raise UserError(
            f"the model refused batches[{error.index % len(batches)}] "
            f"({one_line(f'{type(cause).__name__}: {cause}')[:300]}): a tensor is passed as it is, a tuple as "
            "arguments, a mapping as keyword arguments; the model is unchanged"
        ) from cause


class Fitting(ABC):
    """Fits one coefficient an output of each layer, when the passes first stop there; later calls of it use the same.

    The first half of the passes is the given model, which sets the targets u, the second half the one that is being
    made. With z the matrix product in the latter and f(z) its features, `coefficient * f(z) + b` takes the place of
    `u + b`.

    Args:
        layers: by name, in the model's order.
        masks: the tokens of each batch that count.
        max_error: with a larger median error, a layer is left as it is.

    Attributes:
        coefficients: by layer, float64.
        stays: the layers that are left as they are.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], masks: Sequence[Tensor | None], max_error: float | None = None
    ) -> None:
        self.coefficients: dict[str, Tensor] = {}
        self.stays: set[str] = set()
        self._layers, self._masks = layers, masks
        self._limit = float("inf") if max_error is None else max_error
        self._errors: dict[str, list[Tensor]] = {}
        self._inherited: dict[str, list[Tensor]] = {}

    # what is fitted

    def plain(self, name: str, stop: Stop) -> Tensor:
        """z, the matrix product without bias."""
        return self.target(name, stop)

    def target(self, name: str, stop: Stop) -> Tensor:
        """u, the given model's output without bias."""
        bias = self._layers[name].bias
        return stop.y - bias if isinstance(bias, Tensor) else stop.y

    @abstractmethod
    def put_out(self, name: str, z: Tensor, coefficient: Tensor, bias: Tensor | None) -> Tensor:
        """`coefficient * f(z) + bias`."""

    # the fit

    @torch.no_grad()
    def visit(self, name: str, stops: Mapping[int, Stop]) -> dict[int, Tensor]:
        """Answer the passes that have stopped at a layer."""
        pairs = dict(self._pairs(name, stops))
        if not pairs:
            return {}
        bias = self._layers[name].bias
        counted = [(self._counted(index, z), self._counted(index, u)) for index, (z, u) in pairs.items()]
        first = name not in self.coefficients
        if first:
            if not any(has_size(u) for _, u in counted):
                return {}  # nothing to fit on, and a coefficient of 0 would switch the layer off
            self.coefficients[name] = self._fit(name, counted)
        found = self.coefficients[name]
        errors = [token_errors(self.put_out(name, z, found, None), u) for z, u in counted]
        self._errors.setdefault(name, []).extend(errors)
        self._inherited.setdefault(name, []).extend(token_errors(z, u) for z, u in counted)
        if first and median(errors) > self._limit:
            self.stays.add(name)
        if name in self.stays:
            return {}
        b = bias if isinstance(bias, Tensor) else None
        return {index: self.put_out(name, z, found, b) for index, (z, _) in pairs.items()}

    def errors(self) -> dict[str, float]:
        """The median error a token of each layer that was reached, in the model's order."""
        return {name: median(self._errors[name]) for name in self._layers if name in self._errors}

    def inherited(self) -> dict[str, float]:
        """The same with z in the place of `coefficient * f(z)`."""
        return {name: median(self._inherited[name]) for name in self._layers if name in self._inherited}

    def tokens(self) -> dict[str, int]:
        """How many tokens reached each layer."""
        return {name: sum(map(len, self._errors[name])) for name in self._layers if name in self._errors}

    @abstractmethod
    def _fit(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The coefficients of a layer from z and u of some tokens, both `[tokens, N]`."""

    def _pairs(self, name: str, stops: Mapping[int, Stop]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """For each pass of the model that is being made, z and the target u.

        Routing may give an expert other tokens in the two models. Its own outputs are then the target.
        """
        n = len(self._masks)
        for index in (index for index in stops if index >= n):
            z = self.plain(name, stops[index])
            u = self.target(name, stops[index - n]) if index - n in stops else None
            if u is None or u.shape != z.shape or "expert" in name:
                u = self.target(name, stops[index])
            yield index, (z, u)

    def _counted(self, index: int, z: Tensor) -> Tensor:
        """The rows of the tokens that count, `[tokens, N]`."""
        return counted_rows(z, self._masks[index % len(self._masks)])


class _Calibration(Fitting):
    """Alpha, with `f(z) = norm(z)`."""

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        norms: Mapping[str, Norms],
        masks: Sequence[Tensor | None],
        max_error: float | None,
    ) -> None:
        super().__init__(linears, masks, max_error)
        self.outliers: dict[str, int] = {}
        self._norms = norms

    def alpha(self, name: str) -> Tensor:
        """Alpha as the layer will have it."""
        return self.coefficients[name].float()

    def put_out(self, name: str, z: Tensor, coefficient: Tensor, bias: Tensor | None) -> Tensor:
        norms = self._norms[name]
        return scaled_norm(z, coefficient.float(), bias, group=norms.parts, eps=norms.eps)

    def _fit(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        self.outliers[name] = sum(outliers(torch.cat([u for _, u in pairs])))
        return closed_form(pairs, self._norms[name], name)
