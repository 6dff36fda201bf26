r"""`sdd.revert`: SDD layers back to plain linear layers.

Exact where nothing was lost: calibration keeps the bits of W and b, so a calibrated layer that was not trained since
becomes the layer that it was, bit for bit. (A SHA-256 of V, b and alpha, taken at calibration, shows whether it was.)

Of any other layer no matrix computes the same function, since a norm divides each token by its own scale. The nearest
one with the directions of V has one factor for each output, fitted like alpha in calibration: with z = V x in the
reverted model and u = alpha norm(V x) in the SDD model,

    W_i = c_i V_i,    c_i = sum_t w(t) z_i(t) u_i(t) / sum_t w(t) z_i(t)^2,    w(t) = 1 / mean(u(t)^2)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd.conversion.become import become_plain, converted_in, is_as_calibrated
from sdd.conversion.calibrate import Fitting, as_batches, least_squares, run_batches, token_mask
from sdd.conversion.lockstep import Stop
from sdd.conversion.pretrained import mark
from sdd.conversion.spreads import error_lines
from sdd.errors import UserError
from sdd.nn import SDDLinear
from sdd.terminal import counted


@dataclass(frozen=True)
class RevertReport:
    """What `sdd.revert` did.

    Attributes:
        restored: names of the layers that have the bits from before calibration again.
        fitted: name and error of the others: the median over tokens of the relative error against the SDD model.
    """

    restored: tuple[str, ...]
    fitted: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        lines = [f"{counted(len(self.restored), 'layer')} restored bit for bit, {len(self.fitted)} fitted"]
        return "\n".join([*lines, "", *error_lines(self.fitted)] if self.fitted else lines)


def revert(model: nn.Module, batches: Iterable[Any] | None = None) -> RevertReport:
    """Turn every `SDDLinear` of a model back into the layer that it was, an `nn.Linear` mostly, in place.

    A layer that is as calibration left it gets its former values, bit for bit. The others (trained since, or redrawn by
    mode "reinit") are fitted to `batches`, and their outputs differ from now on by the error in the report. Torch's
    fused inference path of `nn.TransformerEncoder` stays switched off.

    Args:
        model: a converted model.
        batches: examples as for calibration; needed if a layer has changed since calibration.

    Returns:
        Which layers were restored, and which fitted with which error.

    Raises:
        UserError: if there is nothing to revert, if stacked experts are converted, if batches are needed and not
            given, or if they do not reach a layer that needs them; the model is then unchanged.
    """
    found = dict(converted_in(model))
    layers = {name: layer for name, layer in found.items() if isinstance(layer, SDDLinear)}
    if not found:
        raise UserError(f"this {type(model).__name__} has no SDD layer: nothing to revert")
    if stacks := [name for name in found if name not in layers]:
        raise UserError(
            f"{stacks[0]} and {len(stacks) - 1} more are stacked experts, which cannot be reverted: no matrix computes "
            "what they do. Keep experts out of a conversion that is to be reverted: exclude='*experts*'"
        )
    changed = {name: layer for name, layer in layers.items() if not is_as_calibrated(layer)}
    if changed and batches is None:
        raise UserError(
            f"{len(changed)} of {len(layers)} layers, such as {next(iter(changed))}, were trained since calibration or "
            "drawn anew, and no matrix computes what they do: give batches to fit the nearest one"
        )
    fitting = _fit(model, changed, as_batches(batches)) if changed and batches is not None else None
    errors = fitting.errors() if fitting else {}
    if missing := [name for name in changed if name not in errors]:
        raise UserError(f"the batches do not reach {missing[0]}, and {len(missing) - 1} more: give others")
    for name, layer in layers.items():
        if fitting and name in changed:
            with torch.no_grad():
                layer.matrix.mul_(fitting.coefficients[name].to(layer.weight.dtype)[:, None])
        become_plain(layer)
    mark(model)
    return RevertReport(tuple(name for name in layers if name not in changed), tuple(errors.items()))


def _fit(model: nn.Module, changed: Mapping[str, SDDLinear], batches: Sequence[Any]) -> Fitting:
    fitting = _Reverting(changed, [token_mask(batch) for batch in batches])
    run_batches(model, changed, batches, fitting.visit, twice=True)
    return fitting


class _Reverting(Fitting):
    """The nearest rows `c_i V_i`, in the order in which the layers are called."""

    def __init__(self, layers: Mapping[str, SDDLinear], masks: Sequence[Tensor | None]) -> None:
        super().__init__(layers, masks)
        self._sdd = layers

    def plain(self, name: str, stop: Stop) -> Tensor:
        return F.linear(stop.x, self._sdd[name].matrix)

    def _fit(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        width = self._sdd[name].out_features
        return least_squares(pairs, ((width, width),), name)

    def put_out(self, name: str, z: Tensor, coefficient: Tensor, bias: Tensor | None) -> Tensor:
        y = coefficient * z
        return (y if bias is None else y + bias).to(z.dtype)
