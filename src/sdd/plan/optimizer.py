"""What the optimiser of a run costs: bytes of its state, and bytes and FLOPs of its step.

AdamW keeps two moments and a step counter for each tensor, and its step reads four float32 numbers a parameter and
writes three. Muon keeps one, reads three and writes two; for a matrix `[m, n]`, m <= n, each of its five iterations has
`4 m^2 n + 2 m^3` FLOPs. FSDP2 has every GPU orthogonalise every matrix whole, apart from stacks of experts.
"""

from dataclasses import dataclass

from sdd.models import LanguageModel
from sdd.plan.measure import MemoryCase
from sdd.train.optim import moved_by_muon, parameter_groups

_ITERATIONS = 5


@dataclass(frozen=True)
class OptimizerCost:
    """On one GPU.

    Attributes:
        state: bytes of moments and step counters.
        traffic: bytes that a step reads and writes, without what orthogonalisation moves.
        flops: of a step.
        name: in tables.
    """

    state: int
    traffic: int
    flops: int
    name: str


def optimizer_cost(case: MemoryCase, parameters: int) -> OptimizerCost:
    """The cost of the optimiser that a run names.

    Args:
        case: the run and the GPUs.
        parameters: that one GPU keeps.
    """
    groups = parameter_groups(LanguageModel(case.model, device="meta"), case.run.optim)
    named = [(group, name, p) for group in groups for name, p in zip(group["names"], group["params"], strict=True)]
    if case.run.optim.name != "muon":
        name = "AdamW" if case.run.optim.name == "adamw" else "StableAdamW"
        return OptimizerCost(8 * parameters + 4 * len(named), 28 * parameters, 0, name)
    moved = [p for group, name, p in named if moved_by_muon(group, name)]
    one_moment = sum(p.numel() for p in moved) // case.gpus
    flops = 0
    for p in moved:
        m, n = sorted(p.shape[-2:])
        here = case.gpus if p.ndim > 2 else 1  # of a stack, each GPU has its own matrices
        flops += _ITERATIONS * (4 * m * m * n + 2 * m**3) * (p.numel() // (m * n)) // here
    return OptimizerCost(
        8 * parameters - 4 * one_moment + 4 * (len(named) - len(moved)),
        28 * parameters - 8 * one_moment,
        flops,
        "Muon and AdamW",
    )
