"""The guard: what is wrong with a step, and what to do about it.

A step is judged after its gradients are known and before the optimiser uses them:

    take        the optimiser makes its update; of a spike that is only observed, a note is kept
    skip        the step is taken with the next batch instead; the batch's number joins the run's list of skipped ones,
                so that the order of the data stays a pure function of data, seed, step and that list
    roll back   after `patience` skips in a row, or for a damaged weight: the newest whole checkpoint is loaded (without
                one the run begins again); batches found bad stay skipped, unless a weight was to blame
    stop        where the config says so, or rolling back did not help

The guard only decides; the trainer acts, and tells the guard what it did. Without a fault the guard only reads, so a
guarded run equals an unguarded one bit for bit.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdd.spikes import Usual
from sdd.train.config import GuardConfig

#: Far above any weight of a healthy model. A flip of the top exponent bit multiplies a weight below 2 by 2^128 (3e38).
LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Problem:
    """A fault of a step, or of the weights.

    Attributes:
        kind: the check that failed.
        what: the measured numbers, as text for messages.
    """

    kind: Literal["nonfinite", "loss spike", "gradient spike", "damaged weights"]
    what: str


@dataclass(frozen=True)
class Decision:
    """The guard's decision about a step.

    Attributes:
        action: see the head of this file.
        problem: what is wrong; None for a sound step.
        skips_batch: whether the batch is to be passed over from now on. Before a rollback or the end of the run, the
            last bad batch is skipped too.
        reason: why the run stops, for people.
    """

    action: Literal["take", "skip", "roll back", "stop"]
    problem: Problem | None = None
    skips_batch: bool = False
    reason: str = ""


class Guard:
    """Judges each step of a run against the accepted steps before it, with the thresholds of `sdd.spikes`.

    All processes of a run receive the same numbers, so all reach the same decision.

    Args:
        config: thresholds, and what to do.

    Attributes:
        skipped: numbers of the batches that are passed over, in order.
        looked_at: the step of the last event for which `note_event` returned True; None before the first.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped: list[int] = []
        self.looked_at: int | None = None
        self._usual = Usual(config.window)
        self._skips_in_a_row = 0
        self._rollbacks = 0
        self._worst_step = -1

    def judge(self, loss: float, grad_norm: float) -> Problem | None:
        """Compare a step with those before.

        Args:
            loss: in nats a token.
            grad_norm: before clipping.

        Returns:
            What is wrong with the step, or None.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Problem("nonfinite", f"loss {loss:.4g}, gradient norm {grad_norm:.4g}: not finite")
        if spike := self._usual.loss_spike(loss, self.config.loss_margin):
            return Problem("loss spike", spike.what)
        if spike := self._usual.gradient_spike(grad_norm, self.config.grad_factor):
            return Problem("gradient spike", spike.what)
        return None

    def decide(self, problem: Problem | None, damage: Problem | None = None) -> Decision:
        """Decide what to do with a step. This reads the guard's state and does not change it.

        Args:
            problem: the answer of `judge`.
            damage: the answer of `weight_problem`, if the weights were looked at.
        """
        if damage is not None:  # the weights are to blame, not the batch
            if self.config.nonfinite == "stop":
                return Decision("stop", damage, reason="; ".join(each.what for each in (problem, damage) if each))
            return self._roll_back_or_stop(damage)
        if problem is None:
            return Decision("take")
        if problem.kind == "nonfinite" and self.config.nonfinite == "stop":
            return Decision("stop", problem, reason=problem.what)
        if problem.kind != "nonfinite" and self.config.spikes == "observe":
            return Decision("take", problem)
        if self._skips_in_a_row + 1 < self.config.patience:
            return Decision("skip", problem, skips_batch=True)
        return self._roll_back_or_stop(problem, skips_batch=True)

    def _roll_back_or_stop(self, problem: Problem, *, skips_batch: bool = False) -> Decision:
        """Decide to roll back, or to stop if that did not help before."""
        if self._rollbacks < self.config.max_rollbacks:
            return Decision("roll back", problem, skips_batch)
        reason = (
            f"{problem.what}; rolled back {self._rollbacks} times without getting past step {self._worst_step + 1}: "
            "lower the learning rate (optim.lr), or look at data and machine"
        )
        return Decision("stop", problem, skips_batch, reason)

    def taken(self, step: int, loss: float, grad_norm: float) -> None:
        """Record that the step was taken: its numbers join those that later steps are compared with."""
        self._usual.accept(loss, grad_norm)
        self._skips_in_a_row = 0
        if step > self._worst_step:
            self._rollbacks = 0

    def skip(self, batch: int) -> None:
        """Record that the step's batch was passed over."""
        self.skipped = sorted({*self.skipped, batch})
        self._skips_in_a_row += 1

    def rolled_back(self, step: int, skipped: Iterable[int]) -> None:
        """Record a rollback, after the state of the checkpoint was loaded.

        Args:
            step: steps done before the one that failed.
            skipped: batches that stay skipped, beside those of the checkpoint.
        """
        self.skipped = sorted({*self.skipped, *skipped})
        self._skips_in_a_row = 0
        self._rollbacks += 1
        self._worst_step = max(self._worst_step, step)

    def note_event(self, step: int) -> bool:
        """Record an event; return whether the next step is to be probed: only after the first event of a window."""
        if self.looked_at is not None and abs(step - self.looked_at) < self.config.window:
            return False
        self.looked_at = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """The part of the state that a checkpoint holds, as JSON values."""
        usual = {"losses": list(self._usual.losses), "norms": list(self._usual.norms)}
        return {"skipped_batches": self.skipped, "guard": usual}

    def load_state_dict(self, state: dict[str, Any], looked_at: int | None) -> None:
        """Restore the state that a checkpoint holds. The count of rollbacks is kept, because it spans rollbacks."""
        self.skipped, self.looked_at = sorted(set(state["skipped_batches"])), looked_at
        self._usual = Usual(self.config.window)
        for loss, norm in zip(state["guard"]["losses"], state["guard"]["norms"], strict=True):
            self._usual.accept(loss, norm)


def weight_problem(parameters: Iterable[Tensor]) -> Problem | None:
    """Return the problem if a weight is not finite or absurdly large, as memory faults leave it; None otherwise.

    A normalised model can hide such a weight from loss and gradient: the norm divides it away, and the layer is dead.
    """
    # a shard may be empty, and then has no largest value
    local = [shard for p in parameters if (shard := getattr(p, "_local_tensor", p).detach()).numel()]
    if not local:
        return None
    norms = torch._foreach_norm(local, math.inf)  # pyright: ignore[reportPrivateImportUsage]
    largest = torch.stack([norm.float() for norm in norms]).max().item()
    if largest <= LARGEST_WEIGHT:
        return None
    return Problem("damaged weights", f"a weight of {largest:.3g} (sound ones are below {LARGEST_WEIGHT:g})")
