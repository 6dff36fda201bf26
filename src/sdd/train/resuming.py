"""From which checkpoint a run goes on, whether it can, and what is no longer as it was."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.errors import UserError, one_line
from sdd.train import config_io
from sdd.train.checkpoint import DamagedCheckpoint, half_written, list_checkpoints, read_state, remove

if TYPE_CHECKING:
    from sdd.train.trainer import Trainer

#: Fields, and groups of them, that parameters and the order of samples hang on: they cannot change in mid-run.
FIXED = ("model", "seed", "data.batch_size")
#: Those whose change says nothing new: the data have a fingerprint, the environment is compared by itself.
_QUIET = (
    *("steps", "eval_every", "eval_sequences", "checkpoint_every", "probe_every", "keep_checkpoints", "sample_tokens"),
    *("data.path", "data.tokenizer", "data.dtype", "data.eos", "device", "precision", "threads"),
)
#: What the last bits of a result depend on.
_BITS = ("torch", "device", "cuda", "machine", "cpu", "precision", "processes", "threads")

_ABSENT = object()
#: Whether the next step is to be probed, and after which event that was last so.
NO_LOOKS: dict[str, Any] = {"asked": False, "at": None}


def accepted_state(path: Path, run: "Trainer") -> dict[str, Any]:
    """The state of a checkpoint that a run can go on from.

    Raises:
        DamagedCheckpoint: if it lacks what that takes.
        UserError: if it belongs to another model, other data or another format, or lies beyond the end of the run.
    """
    state = read_state(path)
    kinds = {"seconds": int | float, "data": str, "config": dict, "environment": dict}
    fits = {name: isinstance(state.get(name), kind) for name, kind in kinds.items()}
    fits |= {"skipped_batches": _numbers(state.get("skipped_batches"), int), "guard": _is_guard(state.get("guard"))}
    fits["looks"] = _are_looks(state.get("looks", NO_LOOKS))
    for name, fine in fits.items():
        if not fine:
            raise DamagedCheckpoint(f"{path}/state.json has no {name} that fits: it is no checkpoint of a run")
    for name, before, now in _changes(state["config"], config_io.to_dict(run.config)):
        if _is_among(name, FIXED):
            raise UserError(
                f"config.json does not fit {path.name}: {name} is {now}, that was trained with {before}; put it back, "
                "or start a new run"
            )
    if state["data"] != run.data.fingerprint():
        raise UserError(
            f"the training data are not those that {path.name} was trained on "
            f"({run.data.changes(state.get('data_files'))}): bring those back, or start a new run"
        )
    if state["step"] > run.config.steps:
        raise UserError(f"{path} lies beyond the end, steps={run.config.steps}: give more with --steps N to go on")
    return state


def _is_guard(value: Any) -> bool:
    return isinstance(value, dict) and all(_numbers(value.get(name), int | float) for name in ("losses", "norms"))


def _are_looks(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("asked"), bool)
        and (value.get("at") is None or _numbers([value["at"]], int))
    )


def _numbers(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and 0 <= value < 2**62 for value in values)


def resume_newest(run: "Trainer") -> None:
    """Go on from the newest whole checkpoint, at step 0 if there is none; what is passed over is named.

    Raises:
        UserError: if there are checkpoints and none is whole: to lose all the work is for the user to decide.
    """
    folder, world, say = run.run_dir.checkpoints, run.world, run.reporter.say
    for path in world.on_main(lambda: half_written(folder)):
        say(f"passed over: {path} is half-written, the process that wrote it was ended")
        world.on_main(partial(remove, path))
    found = world.on_main(lambda: list_checkpoints(folder))
    for path in reversed(found):
        try:
            state = run.resume(path)
        except DamagedCheckpoint as error:
            say(f"passed over: {one_line(error)}")
        else:
            for line in _remarks(state, config_io.to_dict(run.config), run.environment()):
                say(one_line(line))
            return
    if found:
        raise UserError(
            f"{folder} has no whole checkpoint, {len(found)} damaged: bring one back, or delete them to begin again at "
            "step 0"
        )
    say("no checkpoint yet: at step 0 again")
    run.begin_again()


def _remarks(state: dict[str, Any], config: dict[str, Any], environment: dict[str, Any]) -> Iterator[str]:
    """One line each for settings and surroundings that are not those of the checkpoint, though they may change."""
    settings = [
        f"{name} {before} -> {now}"
        for name, before, now in _changes(state["config"], config)
        if not _is_among(name, (*FIXED, *_QUIET))
    ]
    if settings:
        yield f"settings changed since step {state['step']}: {', '.join(settings)}"
    then = state["environment"]
    other = [name for name in _BITS if then.get(name) != environment[name]]
    around = [f"{name} {_word(then.get(name))} -> {environment[name]}" for name in other]
    if around:
        yield f"from here on not bit for bit what an uninterrupted run gives: {', '.join(around)}"


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, old and new value of each field that differs, of those that the checkpoint's version had."""
    for name, _, _ in config_io.fields():
        old, new = _field(before, name), _field(now, name)
        if old not in (new, _ABSENT):
            yield name, _word(old), _word(new)


def _field(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key, _ABSENT) if isinstance(values, dict) else _ABSENT
    return values


def _word(value: Any) -> str:
    """A value in a message; of a placement, its name."""
    name = value.get("name") if isinstance(value, dict) else value
    return str(name)[:100]


def _is_among(name: str, group: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in group)
