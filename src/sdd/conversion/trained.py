"""The two modes of `sdd.convert` that look at a trained model: "calibrate" and "observe"."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sdd.conversion.become import become_sdd, digest, leave_fused_inference, remember, remember_experts
from sdd.conversion.calibrate import Fit, fit_alphas
from sdd.conversion.closed_form import FAR, Norms
from sdd.conversion.expert_fits import FEW, SPARE, Stack
from sdd.conversion.experts import SDDExperts, SDDModule, become_sdd_experts
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
    if max_error is not None and not (isinstance(max_error, int | float) and max_error > 0):
        raise ValueError(f"max_error={max_error!r} must be above 0: it is a relative error, 0.1 for instance")


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
    if any(linear.weight.is_meta for linear in plan.selection.linears.values()) or any(
        getattr(module, key).is_meta for module, key in plan.selection.experts.values()
    ):
        raise ValueError("some layers are on the meta device: load the weights first, then calibrate")
    proof = None if example is None else _proof(plan, example)
    if proof is not None:
        plan = plan.without({name: f"refuted: {reason}" for name, reason in proof.named("refuted").items()})
    linears, stacks, norms = plan.selection.linears, plan.stacks(), plan.norms()
    fits = fit_alphas(plan.model, linears, norms, batches, max_error, stacks)
    if all(fit.stays for fit in fits.values()):
        least = min((fit.error for fit in fits.values()), default=float("nan"))
        raise ValueError(
            f"no layer can be calibrated: max_error={max_error}, and the least error is {least:.3g}"
            if fits
            else "no layer can be calibrated: the batches reach none of the layers to convert"
        )
    reasons = {name: _reason_to_stay(fits.get(name), max_error) for name in [*linears, *plan.selection.experts]}
    plan = plan.without({name: reason for name, reason in reasons.items() if reason is not None})
    parameters = parameters_of(plan.model)
    modules: dict[str, SDDModule] = {
        name: calibrated(linear, norms[name], fits[name]) for name, linear in plan.selection.linears.items()
    }
    modules |= {name: calibrated_experts(stack, fits) for name, stack in plan.stacks().items()}
    leave_fused_inference(plan.model)
    modules = plan.in_order(modules)
    lines = [replace(line, calibration=_numbers(fits[line.name])) for line in plan.lines(modules)]
    notes = (*_outlier_note(lines), *_few_note({line.name: fits[line.name].few for line in lines}))
    kept = tuple(plan.selection.kept)
    report = ConversionReport(
        tuple(lines), kept, plan.n_layers, notes, mode="calibrate", parameters=parameters, proof=proof
    )
    return report, modules


def _proof(plan: Plan, example: Any) -> Proof:
    """The proof of a conversion that is carried out for it and taken back: it does not depend on alpha."""
    trial = Trial(plan.model, example)
    proof = trial.prove(plan.carry_out())
    trial.before.restore()
    return proof


def observe_trained(plan: Plan, batches: Iterable[Any]) -> ConversionReport:
    """Observe the layers, and the experts of each stack; the model is not changed."""
    stacks = plan.stacks()
    observed = observe(plan.model, plan.selection.linears, plan.norms(), batches, stacks)
    reached: dict[str, set[int | None]] = {}
    for layer in observed:
        reached.setdefault(layer.name, set()).add(layer.expert)
    missing = [
        KeptLayer(name, _UNREACHED)
        for name in [*plan.selection.linears, *plan.selection.experts]
        if name not in reached
    ]
    idle = {
        name: tuple(e for e in range(stack.n_experts) if e not in reached[name])
        for stack in stacks.values()
        for name in stack.names.values()
        if name in reached
    }
    kept, notes = (*plan.selection.kept, *missing), _experts_note(idle, "saw no token", "nothing is known of them")
    return ConversionReport((), kept, plan.n_layers, notes, mode="observe", observed=tuple(observed))


@torch.no_grad()
def calibrated(linear: nn.Module, norms: Norms, fit: Fit) -> SDDLinear:
    """Turn a layer into an SDD layer with the fitted alpha; V and b keep their bits."""
    layer = become_sdd(linear, norms, fit.alpha.square().mean().sqrt().item())
    layer.alpha.copy_(fit.alpha)
    remember(layer, digest(layer))
    return layer


@torch.no_grad()
def calibrated_experts(stack: Stack, fits: Mapping[str, Fit]) -> SDDExperts:
    """Give stacked experts the fitted alphas; V and b keep their bits."""
    alphas = {key: fits[name].alpha for key, name in stack.names.items()}
    rms = {key: alpha.square().mean().sqrt().item() for key, alpha in alphas.items()}
    module = become_sdd_experts(stack.module, rms, stack.eps)
    for key, alpha in alphas.items():
        getattr(module, f"{key}_alpha").copy_(alpha)
    remember_experts(module, {key: digest(module, key) for key in alphas})
    return module


def _numbers(fit: Fit) -> Calibration:
    return Calibration(fit.error, fit.inherited, fit.tokens, fit.outliers, fit.few)


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


def _few_note(few: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """A note on the experts that were not fitted on tokens of their own."""
    done = f"they were fitted on up to {SPARE} tokens of their layer as if these were sent to them; give more batches"
    return _experts_note(few, f"saw fewer than {FEW} tokens", done)


def _experts_note(experts: Mapping[str, tuple[int, ...]], saw: str, what: str) -> tuple[str, ...]:
    """A note that names experts by the module that holds them."""
    modules = {name.rpartition(".")[0]: found for name, found in experts.items() if found}
    if not modules:
        return ()
    named = [f"{', '.join(map(str, found))} of {module}" for module, found in modules.items()]
    return (f"{sum(map(len, modules.values()))} experts {saw} ({'; '.join(named)}): {what}",)


_UNREACHED = "the batches do not reach it"


def _reason_to_stay(fit: Fit | None, max_error: float | None) -> str | None:
    if fit is None:
        return _UNREACHED
    return f"its error of {fit.error:.2g} exceeds max_error={max_error}" if fit.stays else None
