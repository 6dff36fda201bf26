"""The two modes of `sdd.convert` that look at a trained model: "calibrate" and "observe"."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sdd.conversion.become import become_sdd, described, digest, remember
from sdd.conversion.calibrate import FAR, Fit, Norms, fit_alphas
from sdd.conversion.match import Selection
from sdd.conversion.observe import observe
from sdd.conversion.report import Calibration, ConversionReport, ConvertedLayer, KeptLayer
from sdd.nn import SDDLinear

MODES = ("reinit", "calibrate", "observe")


def check_mode(mode: str, batches: Iterable[Any] | None, max_error: float | None) -> None:
    """Raise ValueError if there is no such mode, or arguments do not fit it."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(map(repr, MODES))}")
    if mode == "reinit" and batches is not None:
        raise ValueError("batches were given with mode='reinit', which reads none: did you mean mode='calibrate'?")
    if mode != "reinit" and batches is None:
        raise ValueError(f"mode={mode!r} needs batches: a few examples of what the model was trained on")
    if max_error is not None and mode != "calibrate":
        raise ValueError(f"max_error={max_error} is for mode='calibrate', not for mode={mode!r}")
    if max_error is not None and not max_error > 0:
        raise ValueError(f"max_error={max_error} must be above 0: it is a relative error, 0.1 for instance")


def convert_trained(
    model: nn.Module,
    selection: Selection,
    norms: Mapping[str, Norms],
    batches: Iterable[Any],
    max_error: float | None,
    outputs: Collection[str],
    n_layers: int,
) -> ConversionReport:
    """Calibrate the selected layers.

    Raises:
        ValueError: if no layer is converted; the model is unchanged.
        UserError: see `fit_alphas`.
    """
    if any(linear.weight.is_meta for linear in selection.linears.values()):
        raise ValueError("some layers are on the meta device: load the weights first, then calibrate")
    fits = fit_alphas(model, selection.linears, norms, batches, max_error)
    reasons = {name: _reason_to_stay(fits.get(name), max_error) for name in selection.linears}
    kept = [*selection.kept, *(KeptLayer(name, reason) for name, reason in reasons.items() if reason)]
    converted: list[ConvertedLayer] = []
    if all(fit.stays for fit in fits.values()):
        least = min((fit.error for fit in fits.values()), default=float("nan"))
        raise ValueError(
            f"no layer can be calibrated: max_error={max_error}, and the least error is {least:.3g}"
            if fits
            else "no layer can be calibrated: the batches reach none of the layers to convert"
        )
    for name, linear in selection.linears.items():
        fit = fits.get(name)
        if fit is not None and not fit.stays:
            layer = calibrated(linear, norms[name], fit)
            numbers = Calibration(fit.error, fit.inherited, fit.tokens, fit.outliers)
            converted.append(described(name, layer, name in outputs, digest=vars(layer)["digest"], calibration=numbers))
    notes = _outlier_note(converted)
    return ConversionReport(tuple(converted), tuple(kept), n_layers, notes, mode="calibrate")


def observe_trained(
    model: nn.Module, selection: Selection, norms: Mapping[str, Norms], batches: Iterable[Any], n_layers: int
) -> ConversionReport:
    """Observe the selected layers; the model is not changed."""
    observed = observe(model, selection.linears, norms, batches)
    reached = {layer.name for layer in observed}
    missing = [KeptLayer(name, _UNREACHED) for name in selection.linears if name not in reached]
    kept = (*selection.kept, *missing)
    return ConversionReport((), kept, n_layers, mode="observe", observed=tuple(observed))


@torch.no_grad()
def calibrated(linear: nn.Linear, norms: Norms, fit: Fit) -> SDDLinear:
    """Turn a layer into an SDD layer with the fitted alpha; V and b keep their bits."""
    layer = become_sdd(linear, norms, fit.alpha.square().mean().sqrt().item())
    layer.alpha.copy_(fit.alpha)
    remember(layer, digest(layer))
    return layer


def _outlier_note(layers: Sequence[ConvertedLayer]) -> tuple[str, ...]:
    """A note on the layers at which tokens have another scale than the rest, which a median does not show."""
    found = [layer for layer in layers if layer.calibration and layer.calibration.outliers]
    if not found:
        return ()
    most = max(found, key=lambda layer: layer.calibration.outliers if layer.calibration else 0)
    return (
        f"{len(found)} of the converted layers have tokens with over {FAR:g} times the usual scale, or under "
        f"1/{FAR:g} of it, most of them {most.name}: the norm takes that away, which may cost much; mode='observe' "
        "shows them, and exclude leaves layers out",
    )


_UNREACHED = "the batches do not reach it"


def _reason_to_stay(fit: Fit | None, max_error: float | None) -> str | None:
    if fit is None:
        return _UNREACHED
    return f"its error of {fit.error:.2g} exceeds max_error={max_error}" if fit.stays else None
