"""`mode="observe"`: how the scale of each layer's output behaves, and what a norm would cost there; nothing changes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.calibrate import as_batches, run_batches
from sdd.conversion.closed_form import Norms, closed_form, counted_rows, median, outliers, token_errors, token_mask
from sdd.conversion.expert_fits import Call, Rows, Stack, fit_experts, joined
from sdd.conversion.experts import after_first, expert_keys, expert_shape, normed, product, with_bias
from sdd.conversion.kinds import features
from sdd.conversion.lockstep import Stop
from sdd.functional import scaled_norm


@dataclass(frozen=True)
class ObservedLayer:
    """The scale of one layer's output over the tokens of a few batches.

    Attributes:
        name: dotted name in the model.
        shape: of the matrix, `(out_features, in_features)`.
        tokens: their number.
        rms: median over tokens of the root mean square of `W x`.
        spread: the 90th percentile of that over the 10th; 1 if all tokens have one scale.
        sinks: tokens whose rms is over 10 times the median: massive activations.
        faint: tokens whose rms is under a tenth of the median, as are the values of attention sinks.
        error: the error that calibration would leave with true inputs: the median over tokens of
            `|alpha norm(W x) - W x| / |W x|`, with the alpha of `sdd.conversion.calibrate`.
        expert: of stacked experts, which one; its tokens are those that the model sends to it.
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    rms: float
    spread: float
    sinks: int
    faint: int
    error: float
    expert: int | None = None


def observe(
    model: nn.Module,
    linears: Mapping[str, Any],
    norms: Mapping[str, Norms],
    batches: Iterable[Any],
    stacks: Mapping[str, Stack] | None = None,
) -> list[ObservedLayer]:
    """Observe each layer that the batches reach, and in stacks each expert.

    Args:
        model: any module; it is not changed.
        linears: the layers by name, in the model's order.
        norms: the norm that each would get.
        batches: as for calibration.
        stacks: modules of stacked experts by name.

    Raises:
        UserError: as `fit_alphas`.
    """
    examples, stacks = as_batches(batches), stacks or {}
    masks = [token_mask(batch) for batch in examples]
    found: dict[tuple[str, int | None], list[ObservedLayer]] = {}

    def visit(name: str, stops: Mapping[int, Stop]) -> dict[int, Tensor]:
        if name in stacks:
            calls = [(Call.of(stop), masks[index]) for index, stop in stops.items()]
            seen = _observed_experts(stacks[name], calls)
        else:
            bias = linears[name].bias
            rows = [counted_rows(stop.y if bias is None else stop.y - bias, masks[i]) for i, stop in stops.items()]
            seen = _observed_layer(name, linears[name], torch.cat(rows), norms[name])
        for layer in seen:
            found.setdefault((layer.name, layer.expert), []).append(layer)
        return {}

    modules = {**linears, **{name: stack.module for name, stack in stacks.items()}}
    run_batches(model, modules, examples, visit)
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    owners = {full: name for name, stack in stacks.items() for full in stack.names.values()}
    in_order = sorted(found, key=lambda one: places[owners.get(one[0], one[0])])
    # of a layer that is called several times, the call that sees the most tokens
    return [max(found[one], key=lambda layer: layer.tokens) for one in in_order]


@torch.no_grad()
def _observed_layer(name: str, linear: nn.Module, z: Tensor, norms: Norms) -> list[ObservedLayer]:
    if not len(z):
        return []
    alpha = closed_form([(z, z)], norms, name)
    y = scaled_norm(z, alpha, group=norms.parts, eps=norms.eps)
    n_in, n_out = features(linear)
    return [_observed(name, (n_out, n_in), z, y)]


@torch.no_grad()
def _observed_experts(stack: Stack, calls: Sequence[tuple[Call, Tensor | None]]) -> list[ObservedLayer]:
    """Each expert's outputs of each projection, for the tokens of one call of the module in several passes."""
    module, (call, _, pairs) = stack.module, joined(*zip(*calls, strict=True))
    rows, found = Rows.of(call.x, call.x, pairs, call.experts, stack.n_experts), []
    hidden, places = rows.x, list(rows.by_expert())
    for key in expert_keys(module):
        z = product(module, key, hidden, rows.order)
        hidden = after_first(module, with_bias(module, key, z, rows.order)) if key != "down_proj" else hidden
        if key not in stack.names:
            continue
        alpha = fit_experts(stack, key, [(z[own], z[own]) for own in places])
        y = normed(module, key, z, alpha, rows.order, stack.eps)
        _, n_out, n_in = expert_shape(module, key)
        found += [
            _observed(stack.names[key], (n_out, n_in), z[own], y[own], expert)
            for expert, own in enumerate(places)
            if len(own)
        ]
    return found


def _observed(name: str, shape: tuple[int, int], z: Tensor, y: Tensor, expert: int | None = None) -> ObservedLayer:
    """The numbers of a layer from `W x` and `alpha norm(W x)`."""
    rms = z.float().square().mean(-1).sqrt()
    low, middle, high = (rms.kthvalue(1 + round(q * (len(rms) - 1))).values.item() for q in (0.1, 0.5, 0.9))
    spread = high / low if low else float("inf")
    return ObservedLayer(name, shape, len(rms), middle, spread, *outliers(z), median([token_errors(y, z)]), expert)
