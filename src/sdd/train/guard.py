"""The guard: what is wrong with a step, and whether to take it.

A step is judged after its gradients are known and before the optimiser uses them. Loss and gradient norm are compared
with the steps accepted lately; without a fault the guard only reads, so a guarded run equals an unguarded one bit for
bit. What is done about a bad one is in `sdd.train.recovery`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdd.spikes import Usual
from sdd.train.config import GuardConfig

Kind = Literal["nonfinite", "loss spike", "gradient spike", "damaged weights"]

#: No healthy weight comes near; a weight whose top exponent bit flipped stands at 1e36 or above.
LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Problem:
    """What is wrong with a step.

    Attributes:
        kind: which of the tests failed.
        what: the numbers, for people.
    """

    kind: Kind
    what: str


class Guard:
    """Judges steps against the accepted ones before, by the rules of `sdd.spikes`.

    Args:
        config: thresholds, and what to do.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._usual = Usual(config.window)

    def judge(self, loss: float, grad_norm: float) -> Problem | None:
        """What is wrong with a step, given loss (nats a token) and gradient norm before clipping; None if nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Problem("nonfinite", f"loss {loss:.4g}, gradient norm {grad_norm:.4g}: not finite")
        if spike := self._usual.loss_spike(loss, self.config.loss_margin):
            return Problem("loss spike", spike.what)
        if spike := self._usual.gradient_spike(grad_norm, self.config.grad_factor):
            return Problem("gradient spike", spike.what)
        return None

    def acts_on(self, problem: Problem) -> bool:
        """Whether the config wants something done about it, or only a note."""
        if problem.kind in ("nonfinite", "damaged weights"):
            return self.config.nonfinite == "skip"
        return self.config.spikes == "skip"

    def accept(self, loss: float, grad_norm: float) -> None:
        """Take a step into the running estimates."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._usual.accept(loss, grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """The running estimates as JSON values."""
        return {"losses": list(self._usual.losses), "norms": list(self._usual.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the running estimates up again."""
        self._usual = Usual(self.config.window)
        for loss, norm in zip(state["losses"], state["norms"], strict=True):
            self._usual.accept(loss, norm)


def weight_problem(parameters: Iterable[Tensor]) -> Problem | None:
    """Whether a weight is not finite or absurdly large, as memory faults leave them.

    A normalised model can hide such a weight from loss and gradient: the norm divides it away, and the layer is dead.
    """
    # a shard may be empty, and of the largest absolute value of nothing there is no answer
    local = [shard for p in parameters if (shard := getattr(p, "_local_tensor", p).detach()).numel()]
    if not local:
        return None
    norms = torch._foreach_norm(local, math.inf)  # pyright: ignore[reportPrivateImportUsage]
    largest = torch.stack([norm.float() for norm in norms]).max().item()
    if math.isfinite(largest) and largest <= LARGEST_WEIGHT:
        return None
    return Problem("damaged weights", f"a weight of {largest:.3g} (sound ones are below {LARGEST_WEIGHT:g})")
