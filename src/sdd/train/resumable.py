"""A run that can be left and gone on with: its state, and the checkpoints that hold it."""

from functools import partial
from pathlib import Path
from typing import Any

from sdd.errors import one_line
from sdd.probing import Probe
from sdd.train import checkpoint as ckpt
from sdd.train import config_io, starting
from sdd.train.config import RunConfig
from sdd.train.learner import Learner
from sdd.train.log import RunLog
from sdd.train.parallel import ALONE, World
from sdd.train.recovery import Guard
from sdd.train.run_dir import RunDir, environment
from sdd.train.saving import Saver


class Resumable(Learner):
    """A model in training that stands at a step, and that checkpoints bring back to where it stood.

    The order of samples is a pure function of (data, seed, step, skipped batches), and the learning rate is one of the
    step. So the whole state of a run is: parameters, optimiser moments, generators, the step, and the guard's state.

    Args:
        config: the run.
        run_dir: where its files go; must exist.
        world: the processes that share the run.

    Attributes:
        run_dir, probe, guard, log, saver: the parts beside those of `Learner`.
        step: optimiser steps done.
        seconds: spent in training steps, evaluation and saving excluded, over all sessions of the run.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, world: World = ALONE) -> None:
        super().__init__(config, world)
        self.run_dir = run_dir
        self.guard = Guard(config.guard)
        self.log = RunLog(config, run_dir)
        write = partial(self.log.record, "probe.jsonl")
        self.probe = Probe(self.model, every=config.probe_every, out=write, early=True, losses=self.world.data_size)
        self.step, self.seconds = 0, 0.0
        self.saver = Saver(run_dir, config.keep_checkpoints, self.world, beside=config.checkpoint_async)

    def resume_newest(self) -> None:
        """Go on from the newest whole checkpoint, or begin at step 0 if there is none; say what is passed over.

        Raises:
            UserError: if there are checkpoints and none is whole.
        """
        self.saver.finish()
        state = starting.load_newest(self.run_dir.checkpoints, self.resume, self.log.say, self.world)
        if state is None:
            self.log.say("no checkpoint yet: starting again at step 0")
            self.begin_again()
            return
        for line in starting.remarks(state, config_io.to_dict(self.config), self.environment()):
            self.log.say(line)

    def resume(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint and return its state.

        Raises:
            UserError: if it is damaged, belongs to another model or other data, or lies beyond the end of the run.
        """
        self.world.on_main(lambda: starting.check_state(path, self.config, self.data))
        state = ckpt.load_checkpoint(path, self.model, self.optimizer, self.world)
        self._stand_at(state["step"], state)
        self.seconds = max(self.seconds, state["seconds"])
        return state

    def begin_again(self) -> None:
        """Go back to step 0, with the weights that the seed gives."""
        self.draw_weights()
        self._stand_at(0, {"guard": {"losses": [], "norms": []}, "skipped_batches": []})

    def _stand_at(self, step: int, state: dict[str, Any]) -> None:
        """Set the run to `step`: restore guard and probe, and drop the rows of later steps."""
        self.step = step
        looks = state.get("looks") or {"asked": False, "at": None}
        self.probe.asked = looks["asked"]
        self.guard.load_state_dict(state, looks["at"])
        self.loader.pass_over(self.guard.skipped)
        self.log.reset_alarms()
        self.world.on_main(lambda: self.run_dir.drop_after(step))

    def save(self) -> Path:
        """Write a checkpoint, then delete those that are no longer to be kept."""
        return self.saver.save(self.model, self.optimizer, self._state())

    def save_beside(self) -> None:
        """Have a checkpoint written beside the training if the config says so, else write it."""
        if self.config.checkpoint_async:
            self.saver.begin(self.model, self.optimizer, self._state())
        else:
            self.save()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.step * self.config.tokens_per_step,
            "data": self.data.fingerprint(),
            "data_files": self.data.listing,
            "config": config_io.to_dict(self.config),
            "environment": self.environment(),
            "looks": {"asked": self.probe.asked, "at": self.guard.looked_at},
            **self.guard.state_dict(),
        }

    def environment(self) -> dict[str, Any]:
        """Versions, device and settings that a result depends on beside the config."""
        return environment(self.device, self.precision, self.world.size, self.world.job, self.world.shape)

    def settle(self) -> None:
        """Wait for a checkpoint that is being written; an error is only said, as something else has ended the run."""
        if error := self.saver.settled():
            self.log.say(f"a checkpoint could not be written: {one_line(error)}")

    def newest(self) -> str:
        """The newest checkpoint, for a message about the end of the run."""
        self.settle()
        found = ckpt.list_checkpoints(self.run_dir.checkpoints)
        return str(found[-1]) if found else "none"
