"""`mode="observe"`: how the scale of each layer's output behaves, and what a norm would cost there; nothing changes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.calibrate import (
    Norms,
    as_batches,
    closed_form,
    counted_rows,
    median,
    outliers,
    run_batches,
    token_errors,
    token_mask,
)
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
    """

    name: str
    shape: tuple[int, int]
    tokens: int
    rms: float
    spread: float
    sinks: int
    faint: int
    error: float


def observe(
    model: nn.Module, linears: Mapping[str, Any], norms: Mapping[str, Norms], batches: Iterable[Any]
) -> list[ObservedLayer]:
    """Observe each layer that the batches reach.

    Args:
        model: any module; it is not changed.
        linears: the layers by name, in the model's order.
        norms: the norm that each would get.
        batches: as for calibration.

    Raises:
        UserError: as `fit_alphas`.
    """
    examples = as_batches(batches)
    masks = [token_mask(batch) for batch in examples]
    found: dict[str, list[ObservedLayer]] = {}

    def visit(name: str, stops: Mapping[int, Stop]) -> dict[int, Tensor]:
        bias = linears[name].bias
        rows = [counted_rows(stop.y if bias is None else stop.y - bias, masks[i]) for i, stop in stops.items()]
        if any(len(tokens) for tokens in rows):
            found.setdefault(name, []).append(_observed(name, linears[name], torch.cat(rows), norms[name]))
        return {}

    run_batches(model, linears, examples, visit)
    # of a layer that is called several times, the call that sees the most tokens
    return [max(found[name], key=lambda layer: layer.tokens) for name in linears if name in found]


@torch.no_grad()
def _observed(name: str, linear: nn.Module, z: Tensor, norms: Norms) -> ObservedLayer:
    alpha = closed_form([(z, z)], norms, name)
    errors = token_errors(scaled_norm(z, alpha, group=norms.parts, eps=norms.eps), z)
    n_in, n_out = features(linear)
    rms = z.float().square().mean(-1).sqrt()
    low, middle, high = (rms.kthvalue(1 + round(q * (len(rms) - 1))).values.item() for q in (0.1, 0.5, 0.9))
    return ObservedLayer(
        name,
        (n_out, n_in),
        len(rms),
        middle,
        high / low if low else float("inf"),
        *outliers(z),
        median([errors]),
    )
