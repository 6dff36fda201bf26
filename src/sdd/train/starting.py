"""Trainers for new runs, and for those that go on."""

from dataclasses import replace
from pathlib import Path

from sdd.data import DataSource
from sdd.errors import UserError
from sdd.train import config_io
from sdd.train.config import RunConfig
from sdd.train.data import resolve
from sdd.train.parallel import ALONE, World
from sdd.train.resuming import resume_newest
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer


def fit_vocabulary(config: RunConfig, data: DataSource) -> RunConfig:
    """The config with a vocabulary as large as the data's, if theirs is larger."""
    if data.vocab_size <= config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=data.vocab_size))


def start(config: RunConfig, out: Path, world: World = ALONE) -> Trainer:
    """A trainer for a new run in `out`; if torchrun has restarted the job, for the run that it left there.

    Args:
        config: the run.
        out: the run directory.
        world: the processes that share the run.

    Raises:
        UserError: if `out` holds a run already, or the config does not fit machine or data.
    """
    run_dir = RunDir(out, world.is_main)
    config = replace(config, data=config.data.absolute())
    if world.on_main(run_dir.config.exists):
        if world.on_main(lambda: _is_left_by_job(run_dir, config, world)):
            return reopen(out, world=world)
        world.on_main(run_dir.create)  # says so, before the data are touched
    trainer = Trainer(config, run_dir, world.in_turn(lambda: resolve(config)), world)
    world.on_main(lambda: _claim(run_dir, config))
    return trainer


def _is_left_by_job(run_dir: RunDir, config: RunConfig, world: World) -> bool:
    """Whether an earlier attempt at this job made the run: torchrun repeats the command after a failure.

    It repeats it too, uncounted, when machines come or go; the job's name is then the same.
    """
    if not world.restarted and (world.job is None or run_dir.read_json("environment.json").get("job") != world.job):
        return False
    return config_io.load(run_dir.config) == config


def _claim(run_dir: RunDir, config: RunConfig) -> None:
    run_dir.create()
    try:
        config_io.save(config, run_dir.config)
    except BaseException:
        run_dir.unlock()
        raise


def reopen(out: Path, steps: int | None = None, world: World = ALONE) -> Trainer:
    """A trainer that goes on with the run in `out` from its newest whole checkpoint.

    Args:
        out: the run directory.
        steps: a new length of the run; None keeps it.
        world: the processes that share the run; their number may differ from before.

    Raises:
        UserError: if there is no run, no whole checkpoint and the run was started under other code, or nothing to do.
    """
    run_dir = RunDir(out, world.is_main)
    world.on_main(lambda: _lock_existing(run_dir))
    try:
        config = world.together(lambda: config_io.load(run_dir.config))
        if steps is not None:
            config = replace(config, steps=steps)
        trainer = Trainer(config, run_dir, world=world)
        resume_newest(trainer)
        result = run_dir.read_json("result.json")
        if trainer.step >= config.steps and (result.get("status"), result.get("step")) == ("done", trainer.step):
            raise UserError(f"{out} is complete at step {trainer.step}: give more with --steps N to go on")
        if steps is not None:
            world.on_main(lambda: config_io.save(config, run_dir.config))
    except BaseException:
        run_dir.unlock()
        raise
    return trainer


def _lock_existing(run_dir: RunDir) -> None:
    if not run_dir.config.exists():
        raise UserError(
            f"{run_dir.path} holds no run (no config.json): start one with sdd train PRESET --out {run_dir.path}"
        )
    run_dir.lock()
