"""What is done about a step that went wrong.

    skip        the step is taken with the next batch instead; the batch's number joins the run's list of skipped ones,
                so that the order of the data stays a pure function of data, seed, step and that list
    roll back   after `patience` skips in a row, or damaged weights: the newest whole checkpoint is loaded (without one
                the run begins again); batches found bad stay skipped, unless it was the weights
    stop        where the config says so, or rolling back did not help

Each action is a row `{"step", "event", "kind", "what", "batch", ...}` of metrics.jsonl and a line on the screen.
"""

import time
from typing import TYPE_CHECKING, Any

from sdd.errors import Diverged, RunFailed, UserError
from sdd.train.guard import Guard, Problem, weight_problem
from sdd.train.resuming import NO_LOOKS, resume_newest

if TYPE_CHECKING:
    from sdd.train.trainer import Trainer

#: Steps between looks at all weights; one reads each weight once, a tenth of what the optimiser's step moves.
CHECK_EVERY = 10


class Recovery:
    """The guard of a run and what it has done so far. All processes of the run decide alike.

    Args:
        trainer: the run.

    Attributes:
        guard: judges loss and gradient norm.
        skipped: numbers of the batches that are passed over.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.guard = Guard(trainer.config.guard)
        self.skipped: list[int] = []
        self._skips_in_a_row = 0
        self._rollbacks = 0
        self._worst_step = -1
        self._looked_at: int | None = None

    def allows(self, loss: float, grad_norm: float) -> bool:
        """Judge the trainer's present step, whose gradients are known and not yet used.

        Args:
            loss: of the batch, in nats a token.
            grad_norm: before clipping.

        Returns:
            True to take the step; False if something was done about it, and the trainer's step may be another now.

        Raises:
            Diverged: if it is not finite and the config says stop, or if rolling back did not help.
            RunFailed: if it cannot roll back.
        """
        problem = self.guard.judge(loss, grad_norm)
        if problem is None:
            self._accept(loss, grad_norm)
            return True
        damage = self._damage()
        if damage and self.guard.acts_on(damage):
            self._roll_back(damage)
            return False
        if not self.guard.acts_on(problem):
            if problem.kind == "nonfinite":
                causes = [problem.what, *([damage.what] if damage else [])]
                raise Diverged(f"step {self.trainer.step + 1}: {'; '.join(causes)}")
            self._note("observe", problem)
            self._accept(loss, grad_norm)
            return True
        self._skip(problem)
        return False

    def weights_are_sound(self) -> bool:
        """Look at all weights; if one is damaged, roll back.

        Returns:
            False if the trainer was rolled back.

        Raises:
            Diverged: if one is damaged and the config says stop, or if rolling back did not help.
            RunFailed: if it cannot roll back.
        """
        damage = self._damage()
        if damage is None:
            return True
        if not self.guard.acts_on(damage):
            raise Diverged(f"step {self.trainer.step}: {damage.what}")
        self._roll_back(damage)
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON values."""
        looks = {"asked": self.trainer.probe.asked, "at": self._looked_at}
        return {"skipped_batches": self.skipped, "guard": self.guard.state_dict(), "looks": looks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self.guard.load_state_dict(state["guard"])
        looks = state.get("looks", NO_LOOKS)
        self.trainer.probe.asked, self._looked_at = looks["asked"], looks["at"]
        self._pass_over(state["skipped_batches"])

    def forget(self) -> None:
        """Stand where a run begins."""
        self.load_state_dict({"guard": {"losses": [], "norms": []}, "skipped_batches": []})

    def _accept(self, loss: float, grad_norm: float) -> None:
        self.guard.accept(loss, grad_norm)
        self._skips_in_a_row = 0
        if self.trainer.step > self._worst_step:
            self._rollbacks = 0

    def _skip(self, problem: Problem) -> None:
        self._note("skip", problem)
        self._pass_over([*self.skipped, self._batch()])
        self._skips_in_a_row += 1
        if self._skips_in_a_row == self.guard.config.patience:
            self._roll_back(problem)

    def _roll_back(self, problem: Problem) -> None:
        config, trainer = self.guard.config, self.trainer
        if self._rollbacks == config.max_rollbacks:
            raise Diverged(
                f"step {trainer.step}: {problem.what}; rolled back {self._rollbacks} times without getting past step "
                f"{self._worst_step + 1}: lower the learning rate (optim.lr), or look at data and machine"
            )
        self._rollbacks += 1
        self._worst_step = max(self._worst_step, trainer.step)
        self._skips_in_a_row = 0
        found_bad, at = self.skipped, trainer.step
        try:
            resume_newest(trainer)
        except UserError as error:
            raise RunFailed(f"{problem.what}; cannot roll back: {error}") from None
        if problem.kind != "damaged weights":  # then the batches were innocent
            self._pass_over(found_bad)
        self._note("roll back", problem, at, to=trainer.step)

    def _damage(self) -> Problem | None:
        own = weight_problem(self.trainer.model.parameters())
        if not self.trainer.world.any(own is not None):
            return None
        return own or Problem("damaged weights", "a weight of another process is damaged")

    def _pass_over(self, batches: list[int]) -> None:
        self.skipped = sorted(set(batches))
        self.trainer.loader.pass_over(self.skipped)

    def _batch(self) -> int:
        return self.trainer.loader.batch_index(self.trainer.step)

    def _look(self, step: int) -> None:
        """Have the step after an event probed; of events close together, after the first."""
        if self._looked_at is None or abs(step - self._looked_at) >= self.guard.config.window:
            self._looked_at = step
            self.trainer.probe.look()

    def _note(self, event: str, problem: Problem, at: int | None = None, **more: int) -> None:
        """Record an action on the step after `at`."""
        step = (self.trainer.step if at is None else at) + 1
        row = {"step": step, "event": event, "kind": problem.kind, "what": problem.what, **more}
        if event != "roll back":
            row["batch"] = self._batch()
        self.trainer.record("metrics.jsonl", {**row, "time": time.time()})
        self._look(step)
        done = {
            "observe": "taken all the same",
            "skip": f"batch {row.get('batch')} skipped",
            "roll back": f"back to step {more.get('to')}",
        }[event]
        self.trainer.reporter.say(f"step {step}: {problem.kind}: {problem.what}; {done}")
