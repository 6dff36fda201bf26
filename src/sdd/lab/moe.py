"""The study `moe`: figures 5 and 6 of arXiv 2502.15499 at small size, mixtures of experts against a dense model.

The dense model is `nano`: `moe-nano` has as many active parameters, but for its routers (0.6%).
"""

from dataclasses import replace

from sdd.lab import convergence
from sdd.lab.definition import DEFAULT, Arm, Definition, Outcome, Rates
from sdd.lab.findings import Findings


def read(outcome: Outcome) -> Findings:
    """As `convergence`; the paper prints curves of mixtures of experts and no numbers."""
    return replace(convergence.read(outcome), published=None)


DEFINITION: Definition = replace(
    convergence.DEFINITION,
    name="moe",
    title="Does SDD train mixtures of experts better?",
    question="do mixtures of experts reach a lower loss with SDD, Post-Norm or Pre-Norm, than with QK-norm alone?",
    method=(
        "A mixture of experts in three placements and a dense model of as many active parameters have their learning "
        "rates tuned on seeds and held-out windows of their own.",
        "At these rates each is trained on fresh seeds, the same data in the same order for all.",
        "The losses are those of held-out text, without the router's; factors are as in the study convergence.",
    ),
    arms=(
        Arm("sdd", "sdd"),
        Arm("sdd-prenorm", "sdd-prenorm"),
        Arm("prenorm-qk", "prenorm-qk"),
        Arm("dense", "prenorm-qk", preset="nano"),
    ),
    conditions=(DEFAULT,),
    rates=Rates("tuned", (0.25, 0.5, 1.0, 2.0, 4.0), tuning_seeds=1),
    sizes={},
    read=read,
    preset="moe-nano",
)
