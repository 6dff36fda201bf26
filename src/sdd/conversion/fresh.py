"""Mode "reinit" of `sdd.convert`: new values, for training from scratch."""

from typing import Any

import torch

from sdd.conversion.experts import SDDModule
from sdd.conversion.plan import Plan, parameters_of
from sdd.conversion.report import ConversionReport
from sdd.conversion.trial import Trial


def convert_new(
    plan: Plan, generator: torch.Generator | None, example: Any
) -> tuple[ConversionReport, dict[str, SDDModule]]:
    """Convert the layers and draw their values; prove them, if there is an example, and put back what is refuted.

    Returns:
        The report, and the converted modules by name.

    Raises:
        UserError: see `Trial`; the model is unchanged.
    """
    parameters = parameters_of(plan.model)
    redrawn = not any(linear.weight.is_meta for linear in plan.selection.linears.values())
    trial = None if example is None else Trial(plan.model, example)
    modules = plan.carry_out()
    for module in modules.values():
        module.draw(generator)
    proof = None if trial is None else trial.prove(modules)
    if proof is not None:
        refuted = {name: f"refuted: {reason}" for name, reason in proof.named("refuted").items()}
        plan = plan.without(refuted)
        modules = {name: module for name, module in modules.items() if name not in refuted}
    report = ConversionReport(
        tuple(plan.lines(modules)),
        tuple(plan.selection.kept),
        plan.n_layers,
        redrawn=redrawn,
        parameters=parameters,
        proof=proof,
    )
    return report, modules
