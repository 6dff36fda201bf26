"""Beginning a run and going on with one: which checkpoint to load, whether it fits, and what has changed since."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from sdd.data import DataSource
from sdd.errors import UserError, one_line
from sdd.files import read_json_object
from sdd.train import config_io
from sdd.train.checkpoint import DamagedCheckpoint, half_written, list_checkpoints, read_state, remove
from sdd.train.config import RunConfig
from sdd.train.parallel import World
from sdd.train.run_dir import RunDir

#: Fields, and groups of them, that fix the parameters, the optimiser's state and the order of samples: they cannot
#: change in mid-run.
FIXED = ("model", "seed", "data.batch_size", "optim.name")
#: Values of fixed fields in the checkpoints of versions that did not have them.
_FORMER = {"optim.name": "adamw", "model.statistics": "float32"}
#: Fields whose change is not reported: the data have a fingerprint, and the environment is compared by itself.
_QUIET = (
    *("steps", "eval_every", "eval_sequences", "probe_every", "sample_tokens"),
    *("checkpoint_every", "checkpoint_async", "keep_checkpoints"),
    *("data.path", "data.tokenizer", "data.dtype", "data.eos", "device", "precision", "threads"),
    "parallel",  # the layout in the environment says what became of it
)
#: The parts of the environment that the last bits of a result depend on.
_BITS = ("torch", "device", "cuda", "machine", "cpu", "precision", "processes", "layout", "threads")

State = TypeVar("State")
_Number = Annotated[float, Field(ge=0, lt=2**62)]
_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Estimates(BaseModel):
    losses: list[_Number]
    norms: list[_Number]


class _Looks(BaseModel):
    asked: bool
    at: _Count | None


class _RunState(BaseModel):
    """The part of a checkpoint's state that a run needs to go on from it."""

    seconds: float
    data: str
    config: dict[str, Any]
    environment: dict[str, Any]
    skipped_batches: list[_Count]
    guard: _Estimates
    looks: _Looks | None = None  # checkpoints of earlier versions have none


def fit_vocabulary(config: RunConfig, data: DataSource) -> RunConfig:
    """The config with a vocabulary as large as the data's, if theirs is larger."""
    if data.vocab_size <= config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=data.vocab_size))


def is_of_job(run_dir: RunDir, world: World) -> bool:
    """Whether a run is there that an earlier attempt at this job may have made: torchrun repeats a command that failed.

    It also repeats the command, without counting that as a restart, when machines come or go. The job's name is then
    the same.
    """
    before = read_json_object(run_dir.path / "environment.json")
    same_job = world.restarted or (world.job is not None and before.get("job") == world.job)
    return same_job and run_dir.config.exists()


def holds(run_dir: RunDir, config: RunConfig) -> bool:
    """Whether the run that is there is the one that a config describes."""
    there = config_io.load(run_dir.config)
    return there == (replace(config, compile=there.compile) if config.compile == "auto" else config)


def claim(run_dir: RunDir, config: RunConfig) -> None:
    """Make the run directory, lock it and write config.json."""
    try:
        run_dir.create()
        config_io.save(config, run_dir.config)
    except BaseException:
        run_dir.unlock()
        raise


def lock_existing(run_dir: RunDir) -> None:
    """Lock the directory of a run that is there.

    Raises:
        UserError: if there is none, or another process has it. Nothing is written into a folder of something else.
    """
    if not run_dir.config.exists():
        raise UserError(
            f"{run_dir.path} holds no run (no config.json): start one with sdd train PRESET --out {run_dir.path}"
        )
    config_io.load(run_dir.config)  # many programs call a file of theirs config.json
    run_dir.lock()


def check_state(path: Path, config: RunConfig, data: DataSource) -> None:
    """Check that a run can go on from a checkpoint.

    Raises:
        DamagedCheckpoint: if its state lacks something that the run needs.
        UserError: if it belongs to another model, other data or another format, or lies beyond the end of the run.
    """
    state = read_state(path)
    try:
        _RunState.model_validate(state, strict=True)
    except ValidationError as error:
        name = error.errors(include_url=False)[0]["loc"][0]
        raise DamagedCheckpoint(f"{path}/state.json has no valid {name!r}: it is not the checkpoint of a run") from None
    for name, before, now in _changes(state["config"], config_io.to_dict(config)):
        if _is_among(name, FIXED):
            raise UserError(
                f"config.json does not fit {path.name}: {name} is {now}, the checkpoint was trained with {before}; put "
                "it back, or start a new run"
            )
    if state["data"] != data.fingerprint():
        raise UserError(
            f"the training data are not those that {path.name} was trained on "
            f"({data.changes(state.get('data_files'))}): bring those back, or start a new run"
        )
    if state["step"] > config.steps:
        raise UserError(f"{path} lies beyond the end, steps={config.steps}: give more with --steps N to go on")


def shared_anew(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The config of a run that goes on with its batch cut or shared in another way.

    Raises:
        UserError: if that would make it another run, or a field does not fit.
    """
    changed = config_io.with_overrides(config, changes)
    moe = config.model.moe
    if changed.accumulate != config.accumulate and moe is not None and moe.balance_loss:
        raise UserError(
            f"--accumulate {changed.accumulate} would change the balance loss of this mixture, which depends on the "
            f"tokens in memory at once: leave it at {config.accumulate}"
        )
    return changed


def load_newest(folder: Path, load: Callable[[Path], State], say: Callable[[str], None], world: World) -> State | None:
    """Load the newest whole checkpoint, and name the half-written and damaged ones that are passed over.

    Args:
        folder: RUN/checkpoints.
        load: loads one checkpoint; all processes call it.
        say: receives one line for each checkpoint that is passed over.
        world: the processes that share the run.

    Returns:
        The answer of `load`; None if there are no checkpoints.

    Raises:
        UserError: if there are checkpoints and none is whole: to lose all the work is for the user to decide.
    """
    for path in world.on_main(lambda: half_written(folder)):
        say(f"passed over: {path} is half-written, the process that wrote it was ended")
        world.on_main(partial(remove, path))
    found = world.on_main(lambda: list_checkpoints(folder))
    for path in reversed(found):
        try:
            return load(path)
        except DamagedCheckpoint as error:
            say(f"passed over: {one_line(error)}")
    if found:
        raise UserError(
            f"{folder} has no whole checkpoint, {len(found)} damaged: bring one back, or delete them to begin again at "
            "step 0"
        )
    return None


def remarks(state: dict[str, Any], config: dict[str, Any], environment: dict[str, Any]) -> Iterator[str]:
    """One line on the settings, and one on the environment, that have changed since the checkpoint."""
    settings = [
        f"{name} {before} -> {now}"
        for name, before, now in _changes(state["config"], config)
        if not _is_among(name, (*FIXED, *_QUIET)) and before != "auto"  # what was left open is settled, not changed
    ]
    if settings:
        yield one_line(f"settings changed since step {state['step']}: {', '.join(settings)}")
    then = state["environment"]
    around = [
        f"{name} {_word(then.get(name))} -> {_word(environment.get(name))}"
        for name in _BITS
        if then.get(name) != environment.get(name)
    ]
    if around:
        yield one_line(f"from here on not bit-identical to an uninterrupted run: {', '.join(around)}")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, old and new value of each field that differs; fields that the checkpoint's version lacked are left out."""
    then = _FORMER | config_io.flatten(config_io.with_current_placement(before))
    now = config_io.flatten(now)
    for name, _, _ in config_io.fields():
        if name in then and then[name] != now.get(name):
            yield name, _word(then[name]), _word(now.get(name))


def _word(value: Any) -> str:
    """A value in a message; for a placement, its name."""
    name = value.get("name") if isinstance(value, dict) else value
    return "none" if name is None else str(name)[:100]


def _is_among(name: str, group: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in group)
