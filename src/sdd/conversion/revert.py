r"""`sdd.revert`: SDD layers back to plain linear layers.

Exact where nothing was lost: calibration keeps the bits of W and b, so a calibrated layer that was not trained since
becomes the layer that it was, bit for bit. (A SHA-256 of V, b and alpha, taken at calibration, shows whether it was.)

Of any other layer no matrix computes the same function, since a norm divides each token by its own scale. The nearest
one with the directions of V has one factor for each output, fitted like alpha in calibration: with z = V x in the
reverted model and u = alpha norm(V x) in the SDD model,

    W_i = c_i V_i,    c_i = sum_t w(t) z_i(t) u_i(t) / sum_t w(t) z_i(t)^2,    w(t) = 1 / mean(u(t)^2)

Stacked experts have one factor for each expert and output, fitted as alpha is in `sdd.conversion.expert_fits`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd.conversion.become import become_plain, changed_keys, converted_in, is_as_calibrated
from sdd.conversion.calibrate import Fitting, as_batches, fit_together
from sdd.conversion.closed_form import least_squares, token_mask
from sdd.conversion.expert_fits import Stack, StackFitting
from sdd.conversion.experts import SDDExperts, SDDModule, normed
from sdd.conversion.guards import refuse_no_model
from sdd.conversion.lockstep import Stop
from sdd.conversion.pretrained import mark
from sdd.conversion.spreads import error_lines
from sdd.errors import UserError
from sdd.kernels.experts import Order
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


@torch.inference_mode(False)
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
        UserError: if there is nothing to revert, if an adapter is over a layer or its weight is computed, if batches
            are needed and not given, or if they do not reach a layer that needs them; the model is then unchanged.
    """
    refuse_no_model(model)
    found = dict(converted_in(model))
    _refuse_in_use(model, found)
    if not found:
        raise UserError(f"this {type(model).__name__} has no SDD layer: nothing to revert")
    changed = {name: module for name, module in found.items() if _is_changed(name, module)}
    if changed and batches is None:
        raise UserError(
            f"{len(changed)} of {len(found)} layers, such as {next(iter(changed))}, were trained since calibration or "
            "drawn anew, and no matrix computes what they do: give batches to fit the nearest one"
        )
    coefficients, errors = _fit(model, changed, as_batches(batches)) if changed and batches is not None else ({}, {})
    if missing := [name for name in changed if name not in errors]:
        raise UserError(f"the batches do not reach {missing[0]}, and {len(missing) - 1} more: give others")
    for name, module in changed.items():
        _scale(module, name.rpartition(".")[2], coefficients[name])
    for module in dict.fromkeys(found.values()):
        become_plain(module)
    mark(model)
    fitted = tuple((name, errors[name]) for name in changed)
    return RevertReport(tuple(name for name in found if name not in changed), fitted)


def _refuse_in_use(model: nn.Module, found: Mapping[str, SDDModule]) -> None:
    """Raise UserError for an adapter over an SDD layer, and for a V that is computed: a plain layer breaks both."""
    for name, module in model.named_modules():
        if getattr(module, "base_layer", None) in found.values():
            raise UserError(f"{name} is an adapter over an SDD layer: merge it first (merge_and_unload of PEFT)")
    for name, module in found.items():
        key = "weight" if isinstance(module, SDDLinear) else name.rpartition(".")[2]
        if module._parameters.get(key) is None:
            raise UserError(f"the {key} of {name} is computed (parametrised, pruned): make it a parameter first")


def _is_changed(name: str, module: SDDModule) -> bool:
    if isinstance(module, SDDExperts):
        return name.rpartition(".")[2] in changed_keys(module)
    return not is_as_calibrated(module)


def _fit(
    model: nn.Module, changed: Mapping[str, SDDModule], batches: Sequence[Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The factors by name, and the errors that they leave."""
    layers = {name: module for name, module in changed.items() if isinstance(module, SDDLinear)}
    stacks: dict[str, Stack] = {}
    for name, module in changed.items():
        if isinstance(module, SDDExperts):
            owner, _, key = name.rpartition(".")
            names = stacks[owner].names if owner in stacks else {}
            stacks[owner] = Stack(module, {**names, key: name}, module.eps)
    masks = [token_mask(batch) for batch in batches]
    fitting, experts = _Reverting(layers, masks), _RevertingExperts(stacks, masks)
    fit_together(model, fitting, layers, experts, stacks, batches)
    return fitting.coefficients | experts.coefficients, fitting.errors() | experts.errors()


@torch.no_grad()
def _scale(module: SDDModule, key: str, factors: Tensor) -> None:
    """Multiply the row of each output."""
    if isinstance(module, SDDLinear):
        module.matrix.mul_(factors.to(module.weight.dtype)[:, None])
        return
    weight: Any = getattr(module, key)
    weight.mul_(factors.to(weight.dtype).unsqueeze(1 if module.is_transposed else 2))


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


class _RevertingExperts(StackFitting):
    """The nearest rows `c_ei V_ei` of each expert."""

    def target(self, stack: Stack, key: str, z: Tensor, order: Order) -> Tensor:
        alpha = stack.module._parameters.get(f"{key}_alpha")
        return z if alpha is None else normed(stack.module, key, z, alpha, order, stack.eps)

    def fit(self, stack: Stack, key: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        width = pairs[0][0].shape[1]
        return torch.stack([least_squares([pair], ((width, width),), stack.names[key]) for pair in pairs])

    def put_out(self, stack: Stack, key: str, z: Tensor, coefficient: Tensor, order: Order) -> Tensor:
        return (coefficient[order.experts_M] * z).to(z.dtype)
