r"""Calibration: the alpha with which an SDD layer comes nearest to the trained linear layer that it replaces.

With the matrix W of a trained layer kept as V, bit for bit, and its bias b kept, each output i has one number to fit.
Over tokens t, with x the input in the converted model and x* that in the original one,

    n(t) = norm(W x(t)),    u(t) = W x*(t),    w(t) = 1 / mean(u(t)^2)

    alpha_i = sum_t w(t) n_i(t) u_i(t) / sum_t w(t) n_i(t)^2

is the least-squares solution of `alpha * norm(V x) + b = W x* + b`. The weight w makes all tokens count alike: without
it, a few tokens with huge outputs (attention sinks) decide alone. With norm groups, mean squares are those of a group.

Where x = x*, the error of a token is how far its own scale is from the common one: a norm erases the magnitude, and no
alpha brings it back.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.lockstep import RefusedBatch, Stop, Visit, in_lockstep
from sdd.errors import UserError, one_line
from sdd.functional import norm, scaled_norm, statistics_dtype
from sdd.norm_groups import Parts

#: A token whose output is this many times larger than the median one is a sink, so many times smaller faint. Norms
#: bring both to the common scale, however few they are.
FAR = 10.0


@dataclass(frozen=True)
class Norms:
    """The norm that a layer is to get.

    Attributes:
        parts: its groups, resolved.
        eps: added to the mean square, inside the root.
        shared_alpha: one alpha of group width for all groups of a part.
    """

    parts: Parts
    eps: float = 1e-6
    shared_alpha: bool = False


@dataclass(frozen=True)
class Fit:
    """A layer's alpha and how near it comes.

    Attributes:
        alpha: float32, on the layer's device.
        error: median over tokens of `|alpha norm(V x) - W x*| / |W x*|`: against the original model, errors of the
            converted layers before it included.
        inherited: the same of the plain layer, `|W x - W x*| / |W x*|`: what the layers before it cause alone.
        tokens: their number.
        outliers: tokens of the original model whose rms is over 10 times the median, or under a tenth of it.
        stays: whether the error is beyond the limit, so that the layer stays plain.
    """

    alpha: Tensor
    error: float
    inherited: float
    tokens: int
    outliers: int = 0
    stays: bool = False


def fit_alphas(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    norms: Mapping[str, Norms],
    batches: Iterable[Any],
    max_error: float | None = None,
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

    Returns:
        The fits; a layer that no batch reaches is not among them.

    Raises:
        UserError: if there are no batches, if the model refuses one, or if an output is not finite.
    """
    examples = as_batches(batches)
    fitting = _Calibration(linears, norms, [token_mask(batch) for batch in examples], max_error)
    run_batches(model, linears, examples, fitting.visit, twice=True)
    errors, inherited, tokens = fitting.errors(), fitting.inherited(), fitting.tokens()
    return {
        name: Fit(
            fitting.coefficients[name].float(),
            errors[name],
            inherited[name],
            tokens[name],
            fitting.outliers[name],
            name in fitting.stays,
        )
        for name in errors
    }


def as_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list.

    Raises:
        UserError: if they are none, or one example instead of several.
    """
    if isinstance(batches, Tensor | Mapping):
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

    def put_out(self, name: str, z: Tensor, coefficient: Tensor, bias: Tensor | None) -> Tensor:
        norms = self._norms[name]
        return scaled_norm(z, coefficient.float(), bias, group=norms.parts, eps=norms.eps)

    def _fit(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        self.outliers[name] = sum(outliers(torch.cat([u for _, u in pairs])))
        return closed_form(pairs, self._norms[name], name)


def closed_form(pairs: Iterable[tuple[Tensor, Tensor]], norms: Norms, name: str) -> Tensor:
    """Alpha by least squares over tokens of equal weight, see the head of this module.

    Args:
        pairs: `W x` and `W x*` of some tokens, both `[tokens, N]`.
        norms: the groups and eps.
        name: of the layer, for messages.

    Returns:
        Alpha in float64; an output that is always 0 gets the value of its whole part.

    Raises:
        UserError: if a value is not finite.
    """
    features = [(norm_in_parts(z, norms), u) for z, u in pairs]
    return least_squares(features, norms.parts, name, norms.shared_alpha)


def least_squares(
    pairs: Iterable[tuple[Tensor, Tensor]], parts: Iterable[tuple[int, int]], name: str, shared: bool = False
) -> Tensor:
    """`sum_t w f u / sum_t w f^2` for each output, with `w = 1 / mean(u^2)` over each token's group.

    Args:
        pairs: the features f and the target u of some tokens, both `[tokens, N]`.
        parts: `(width, group_width)` of consecutive outputs; those of group width 0 are left out.
        name: of the layer, for messages.
        shared: one value for each place in a group.

    Raises:
        UserError: if a value is not finite.
    """
    parts, totals = tuple(parts), torch.zeros(())
    for f, u in pairs:
        w = _weights(u, parts)
        sums = ((w * product).sum(0, dtype=torch.float64) for product in (f * u, f.square()))
        totals = totals.to(u.device) + torch.stack(list(sums))
    if not totals.isfinite().all():
        raise UserError(
            f"{name} puts out values that are not finite on these batches: look at the model or the batches"
        )
    spans = [(totals[:, start:stop], width) for start, stop, width in _spans(parts) if width]
    return torch.cat([_ratio(total.unflatten(1, (-1, width)).sum(1) if shared else total) for total, width in spans])


def _ratio(totals: Tensor) -> Tensor:
    """First row over second; where the second is 0, since an output is always 0, the ratio of their sums."""
    tiny = torch.finfo(totals.dtype).tiny
    (top, bottom), (whole, of) = totals, totals.sum(1)
    return torch.where(bottom > 0, top / bottom.clamp_min(tiny), whole / of.clamp_min(tiny))


def _spans(parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """First feature, last feature + 1 and group width of each part."""
    start = 0
    for width, group_width in parts:
        yield start, start + width, group_width
        start += width


def norm_in_parts(z: Tensor, norms: Norms) -> Tensor:
    """`norm(z)` by groups, without alpha, at least float32; plain parts as they are."""
    pieces = [
        norm(z[..., start:stop], norms.eps, width) if width else z[..., start:stop].float()
        for start, stop, width in _spans(norms.parts)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _weights(u: Tensor, parts: Iterable[tuple[int, int]]) -> Tensor:
    """`1 / mean(u^2)` over each token's group, for each of its features; 0 where all are 0."""
    pieces = []
    for start, stop, width in _spans(parts):
        wide = u[..., start:stop].to(statistics_dtype(u.dtype))
        groups = wide.unflatten(-1, (-1, width or stop - start))
        square = groups.square().mean(-1, keepdim=True)
        weight = torch.where(square > 0, 1 / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
        pieces.append(weight.expand_as(groups).flatten(-2))
    return torch.cat(pieces, -1)


def token_errors(y: Tensor, target: Tensor) -> Tensor:
    """`|y - target| / |target|` of each token whose target is not 0, float32 `[tokens]`."""
    y, target = (value.reshape(-1, value.shape[-1]).float() for value in (y, target))
    size = target.norm(dim=-1)
    return ((y - target).norm(dim=-1) / size)[size > 0]


def median(parts: Sequence[Tensor]) -> float:
    """The median of some numbers in pieces; 0 of none."""
    numbers = torch.cat(list(parts))
    return numbers.median().item() if numbers.numel() else 0.0


def outliers(z: Tensor) -> tuple[int, int]:
    """How many tokens of `[tokens, N]` have an rms over 10 times the median, and how many one under a tenth of it."""
    size = z.float().square().mean(-1).sqrt()
    middle = size.median()
    return int((size > FAR * middle).sum()), int((size * FAR < middle).sum())


def token_mask(batch: Any) -> Tensor | None:
    """Where a batch's `attention_mask` `[B, T]` has tokens; None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def counted_rows(z: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of the tokens that count, `[tokens, N]`; all where the mask has another shape."""
    return z.reshape(-1, z.shape[-1]) if mask is None or mask.shape != z.shape[:-1] else z[mask.to(z.device)]
