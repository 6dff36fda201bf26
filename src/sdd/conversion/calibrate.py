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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.lockstep import RefusedBatch, Visit, in_lockstep
from sdd.errors import UserError, one_line
from sdd.functional import norm, scaled_norm, statistics_dtype
from sdd.norm_groups import Parts


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
        stays: whether the error is beyond the limit, so that the layer stays plain.
    """

    alpha: Tensor
    error: float
    inherited: float
    tokens: int
    stays: bool = False


def fit_alphas(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
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
    calibration = _Calibration(linears, norms, [token_mask(batch) for batch in examples], max_error)
    # the passes of the original model come first, then those of the converted one in the same order
    run_batches(model, linears, examples, calibration.visit, twice=True)
    return calibration.fits()


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
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[Any], visit: Visit, *, twice: bool = False
) -> None:
    """Run the batches in lockstep, each of them twice if asked to, and say which one the model refuses.

    Raises:
        UserError: if the model refuses a batch, or `visit` raises one.
    """
    try:
        in_lockstep(model, linears, [*batches, *batches] if twice else batches, visit)
    except RefusedBatch as error:
        cause = error.__cause__
        raise UserError(
            f"the model refused batches[{error.index % len(batches)}] "
            f"({one_line(f'{type(cause).__name__}: {cause}')[:300]}): a tensor is passed as it is, a tuple as "
            "arguments, a mapping as keyword arguments; the model is unchanged"
        ) from cause


class _Calibration:
    """The state of a calibration between stops."""

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        norms: Mapping[str, Norms],
        masks: Sequence[Tensor | None],
        max_error: float | None,
    ) -> None:
        self._linears, self._norms, self._masks = linears, norms, masks
        self._limit = float("inf") if max_error is None else max_error
        self._alphas: dict[str, Tensor] = {}
        self._stays: set[str] = set()
        self._errors: dict[str, list[Tensor]] = {}
        self._inherited: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def visit(self, name: str, outputs: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """Fit a layer when the passes first stop at it, and compute what the converted ones go on with."""
        pairs = dict(self._pairs(name, outputs))
        if not pairs:
            return {}
        norms, bias = self._norms[name], self._linears[name].bias
        counted = [(self._counted(index, z), self._counted(index, u)) for index, (z, u) in pairs.items()]
        first = name not in self._alphas
        if first:
            self._alphas[name] = closed_form(counted, norms, name)
        alpha = self._alphas[name]
        errors = [token_errors(scaled_norm(z, alpha, group=norms.parts, eps=norms.eps), u) for z, u in counted]
        self._errors.setdefault(name, []).extend(errors)
        self._inherited.setdefault(name, []).extend(token_errors(z, u) for z, u in counted)
        if first and median(errors) > self._limit:
            self._stays.add(name)
        if name in self._stays:
            return {}
        return {
            index: scaled_norm(z, alpha, bias, group=norms.parts, eps=norms.eps) for index, (z, _) in pairs.items()
        }

    def fits(self) -> dict[str, Fit]:
        """The result, in the model's order."""
        return {
            name: Fit(
                self._alphas[name],
                median(self._errors[name]),
                median(self._inherited[name]),
                sum(len(errors) for errors in self._errors[name]),
                name in self._stays,
            )
            for name in self._linears
            if name in self._alphas
        }

    def _pairs(self, name: str, outputs: Mapping[int, Tensor]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """For each converted pass, `W x` and the target `W x*`, without bias.

        Routing may give an expert other tokens in the two models. Its own outputs are then the target.
        """
        bias, n = self._linears[name].bias, len(self._masks)
        plain = {index: y if bias is None else y - bias for index, y in outputs.items()}
        for index in (index for index in plain if index >= n):
            z, u = plain[index], plain.get(index - n)
            yield index, (z, z if u is None or u.shape != z.shape or "expert" in name else u)

    def _counted(self, index: int, z: Tensor) -> Tensor:
        """The rows of the tokens that count, `[tokens, N]`."""
        mask = self._masks[index % len(self._masks)]
        if mask is None or mask.shape != z.shape[:-1]:
            return z.reshape(-1, z.shape[-1])
        return z[mask.to(z.device)]


def closed_form(pairs: Iterable[tuple[Tensor, Tensor]], norms: Norms, name: str) -> Tensor:
    """Alpha by least squares over tokens of equal weight, see the head of this module.

    Args:
        pairs: `W x` and `W x*` of some tokens, both `[tokens, N]`.
        norms: the groups and eps.
        name: of the layer, for messages.

    Returns:
        Alpha in float32; an output that is always 0 gets the mean of its part.

    Raises:
        UserError: if a value is not finite.
    """
    top, bottom = 0, 0
    for z, u in pairs:
        n, w = norm_in_parts(z, norms), _weights(u, norms.parts)
        top = top + (w * n * u).sum(0, dtype=torch.float64)
        bottom = bottom + (w * n.square()).sum(0, dtype=torch.float64)
    assert isinstance(top, Tensor) and isinstance(bottom, Tensor)
    if not (top.isfinite().all() and bottom.isfinite().all()):
        raise UserError(f"{name} puts out values that are not finite on these batches: look at the model or the batches")
    return torch.cat(
        [
            _ratio(*(_folded(total[start:stop], width, norms.shared_alpha) for total in (top, bottom)))
            for start, stop, width in _spans(norms.parts)
            if width
        ]
    ).float()


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """`top / bottom`; where an output is always 0, that of the whole part."""
    whole = top.sum() / bottom.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(bottom > 0, top / bottom.clamp_min(torch.finfo(torch.float64).tiny), whole)


def _folded(total: Tensor, width: int, shared: bool) -> Tensor:
    return total.unflatten(0, (-1, width)).sum(0) if shared else total


def _spans(parts: Parts) -> Iterator[tuple[int, int, int]]:
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


def _weights(u: Tensor, parts: Parts) -> Tensor:
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
    y, target = y.flatten(0, -2).float(), target.flatten(0, -2).float()
    size = target.norm(dim=-1)
    return ((y - target).norm(dim=-1) / size)[size > 0]


def median(parts: Sequence[Tensor]) -> float:
    """The median of some numbers in pieces; 0 of none."""
    numbers = torch.cat(list(parts))
    return numbers.median().item() if numbers.numel() else 0.0


def token_mask(batch: Any) -> Tensor | None:
    """Where a batch's `attention_mask` `[B, T]` has tokens; None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
