"""The two modes of `sdd.convert` that look at a trained model: "calibrate" and "observe"."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sdd.conversion.become import become_sdd, digest, leave_fused_inference, remember
from sdd.conversion.calibrate import FAR, Fit, Norms, fit_alphas
from sdd.conversion.experts import SDDModule
from sdd.conversion.observe import observe
from sdd.conversion.plan import Plan, parameters_of
from sdd.conversion.proof import Proof
from sdd.conversion.report import Calibration, ConversionReport, ConvertedLayer, KeptLayer
from sdd.conversion.trial import Trial
from sdd.nn import SDDLinear

MODES = ("reinit", "calibrate", "observe")


def check_mode(
    mode: str, batches: Iterable[Any] | None, max_error: float | None, example: Any = None, redraw: bool = False
) -> None:
    """Raise ValueError if there is no such mode, or arguments do not fit it."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(map(repr, MODES))}")
    if mode == "reinit" and batches is not None:
        raise ValueError("batches were given with mode='reinit', which reads none: did you mean mode='calibrate'?")
    if mode != "reinit" and batches is None:
        raise ValueError(f"mode={mode!r} needs batches: a few examples of what the model was trained on")
    if max_error is not None and mode != "calibrate":
        raise ValueError(f"max_error={max_error} is for mode='calibrate', not for mode={mode!r}")
    if example is not None and mode == "observe":
        raise ValueError("an example proves a conversion, and mode='observe' converts nothing: leave it out")
    if redraw and mode != "reinit":
        raise ValueError(f"redraw=True is for mode='reinit': mode={mode!r} keeps all weights")
    if max_error is not None and not max_error > 0:
        raise ValueError(f"max_error={max_error} must be above 0: it is a relative error, 0.1 for instance")


def without_experts(plan: Plan) -> Plan:
    """The plan with stacked experts among the layers that stay, since their alphas cannot be fitted."""
    return plan.without({name.rpartition(".")[0]: _EXPERTS for name in plan.selection.experts})


def convert_trained(
    plan: Plan, batches: Iterable[Any], max_error: float | None, example: Any = None
) -> tuple[ConversionReport, dict[str, SDDModule]]:
    """Calibrate the layers; those that an example refutes are left out before alphas are fitted.

    Returns:
        The report, and the converted modules by name.

    Raises:
        ValueError: if no layer is converted; the model is unchanged.
        UserError: see `fit_alphas` and `Trial`.
    """
    if any(linear.weight.is_meta for linear in plan.selection.linears.values()):
        raise ValueError("some layers are on the meta device: load the weights first, then calibrate")
    proof = None if example is None else _proof(plan, example)
    if proof is not None:
        plan = plan.without({name: f"refuted: {reason}" for name, reason in proof.named("refuted").items()})
    linears, norms = plan.selection.linears, plan.norms()
    fits = fit_alphas(plan.model, linears, norms, batches, max_error)
    if all(fit.stays for fit in fits.values()):
        least = min((fit.error for fit in fits.values()), default=float("nan"))
        raise ValueError(
            f"no layer can be calibrated: max_error={max_error}, and the least error is {least:.3g}"
            if fits
            else "no layer can be calibrated: the batches reach none of the layers to convert"
        )
    reasons = {name: _reason_to_stay(fits.get(name), max_error) for name in linears}
    kept = [*plan.selection.kept, *(KeptLayer(name, reason) for name, reason in reasons.items() if reason)]
    parameters = parameters_of(plan.model)
    modules: dict[str, SDDModule] = {
        name: calibrated(linear, norms[name], fits[name]) for name, linear in linears.items() if not reasons[name]
    }
    leave_fused_inference(plan.model)
    lines = [replace(line, calibration=_numbers(fits[line.name])) for line in plan.lines(modules)]
    notes = _outlier_note(lines)
    report = ConversionReport(
        tuple(lines), tuple(kept), plan.n_layers, notes, mode="calibrate", parameters=parameters, proof=proof
    )
    return report, modules


def _proof(plan: Plan, example: Any) -> Proof:
    """The proof of a conversion that is carried out for it and taken back: it does not depend on alpha."""
    trial = Trial(plan.model, example)
    proof = trial.prove(plan.carry_out())
    trial.before.restore()
    return proof


def observe_trained(plan: Plan, batches: Iterable[Any]) -> ConversionReport:
    """Observe the layers; the model is not changed."""
    observed = observe(plan.model, plan.selection.linears, plan.norms(), batches)
    reached = {layer.name for layer in observed}
    missing = [KeptLayer(name, _UNREACHED) for name in plan.selection.linears if name not in reached]
    kept = (*plan.selection.kept, *missing)
    return ConversionReport((), kept, plan.n_layers, mode="observe", observed=tuple(observed))


@torch.no_grad()
def calibrated(linear: nn.Module, norms: Norms, fit: Fit) -> SDDLinear:
    """Turn a layer into an SDD layer with the fitted alpha; V and b keep their bits."""
    layer = become_sdd(linear, norms, fit.alpha.square().mean().sqrt().item())
    layer.alpha.copy_(fit.alpha)
    remember(layer, digest(layer))
    return layer


def _numbers(fit: Fit) -> Calibration:
    return Calibration(fit.error, fit.inherited, fit.tokens, fit.outliers)


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
_EXPERTS = "stacked experts: mode='reinit' converts them, calibration does not yet"


def _reason_to_stay(fit: Fit | None, max_error: float | None) -> str | None:
    if fit is None:
        return _UNREACHED
    return f"its error of {fit.error:.2g} exceeds max_error={max_error}" if fit.stays else None
