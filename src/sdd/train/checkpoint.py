"""Checkpoints: torch.distributed.checkpoint over safetensors, written aside and renamed, nothing pickled.

    RUN/checkpoints/step-00000500/
        *.safetensors          parameters, optimiser state and RNG state by name. There is one file a process, with its
                               parts of the matrices; tensors that all processes hold alike are in one of the files
        state.json             step, tokens, seconds, config, versions, size and SHA-256 of every other file, and its
                               own SHA-256

Files are written into `.tmp-step-00000500`, which is renamed when all of them are on the disk, state.json last. So a
folder with the final name is whole unless something harmed it later, which the recorded sizes and hashes show. They
guard against accidents, not against a forger. A forger can only choose which numbers are loaded: nothing that is read
is executed.

A checkpoint loads on any number of processes. One RNG state is enough for all: the generators only draw the initial
weights, which every process draws alike.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sdd.errors import UserError
from sdd.files import is_stray, read_json_object, sync, write_aside
from sdd.train.optim import optimizer_tensors
from sdd.train.parallel import ALONE, World

FORMAT = 2
_NAME = re.compile(r"step-([0-9]{8,18})")
_ASIDE, _LEAVING = ".tmp-", ".old-"  # a checkpoint that is being written, and one that is being deleted


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or not what was written."""


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World = ALONE
) -> Path:
    """Write one checkpoint; see `write_checkpoint`.

    Args:
        folder: RUN/checkpoints, which all processes see.
        model: its parameters are saved by name.
        optimizer: its state is saved by parameter name.
        state: JSON values; must hold "step".
        world: the processes that hold the model; each writes its part.
    """
    return write_checkpoint(folder, tensors_of(model, optimizer), state, world)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], world: World = ALONE) -> Path:
    """Write one checkpoint of tensors that are already collected, see `tensors_of`.

    Args:
        folder: RUN/checkpoints, which all processes see.
        tensors: by name; of DTensors, each process writes its part.
        state: JSON values; must hold "step".
        world: the processes that hold the model; each writes its part.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if the disk refuses, on every process; what was there before stays.
    """
    final = folder / f"step-{state['step']:08d}"
    aside = folder / f"{_ASIDE}{final.name}"
    try:
        world.on_main(lambda: _make_empty(aside))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=world.size > 1)
        with _unwrapped():
            dcp_save(tensors, storage_writer=writer, process_group=world.group)
        written = world.gather(world.together(lambda: _synced_digests(aside, world)))
        files = dict(sorted(item for part in written for item in part.items()))
        world.on_main(lambda: _complete(aside, final, sealed({"format": FORMAT, **state, "files": files})))
    except BaseException:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, world: World = ALONE
) -> dict[str, Any]:
    """Read a checkpoint into a model and, to go on with training, into an optimiser and torch's generators.

    Args:
        path: the checkpoint, written by any number of processes.
        model: takes the parameters.
        optimizer: takes its state, if given.
        world: the processes that hold the model.

    Returns:
        The state that `save_checkpoint` was given.

    Raises:
        DamagedCheckpoint: if a file is missing, changed or not what it should be. All processes raise.
        UserError: if it has another format, or its parameters are not the model's. All processes raise.
    """
    state = world.on_main(lambda: read_state(path))
    world.together(lambda: verify(path, state, world))
    reader = _reader(path, state["files"])
    tensors = tensors_of(model, optimizer)
    saved = world.together(lambda: _fitting(path, reader, tensors))
    tensors = {name: tensor for name, tensor in tensors.items() if name in saved}  # all but another device's generator
    with _damage(path), _unwrapped():
        dcp_load(tensors, storage_reader=reader)
    if optimizer is not None:
        with _damage(path):
            torch.set_rng_state(tensors["rng.cpu"])
            if torch.cuda.is_available() and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        DamagedCheckpoint: if it is missing or not what was written.
        UserError: if it is of another format.
    """
    state = read_json_object(path / "state.json")
    if not state:
        raise DamagedCheckpoint(f"{path} has no readable state.json: it is not a whole checkpoint")
    intact, version = state == sealed(state), state.get("format")
    if type(version) is int and version != FORMAT and (intact or "sha256" not in state):
        raise UserError(
            f"{path} has checkpoint format {version}, this version of sdd reads {FORMAT}: use the version that wrote it"
        )
    if not intact:
        raise DamagedCheckpoint(f"{path}/state.json is damaged (its SHA-256 differs from what was written)")
    if not _is_step(path, state.get("step")) or not _are_files(state.get("files")):
        raise DamagedCheckpoint(f"{path}/state.json does not belong to this checkpoint: its step or files do not fit")
    return state


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a SHA-256 of all its other values, which shows damage to state.json."""
    content = {name: value for name, value in state.items() if name != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def verify(path: Path, state: dict[str, Any], world: World = ALONE) -> None:
    """Compare size and SHA-256 of every file with those recorded; several processes share the files.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    for name, expected in list(state["files"].items())[world.rank :: world.size]:
        file = path / name
        try:
            if not file.is_file():
                raise DamagedCheckpoint(f"{path}: {name} is missing")
            if _digest(file) != expected:
                raise DamagedCheckpoint(f"{path}: {name} is damaged (size or SHA-256 differ from what was written)")
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {name} cannot be read: {error.strerror}") from None
    for file in path.glob("*.safetensors"):
        if file.name not in state["files"] and not is_stray(file.name):
            raise DamagedCheckpoint(f"{path}: {file.name} is no part of the checkpoint")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in RUN/checkpoints, oldest first, without half-written ones."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def half_written(folder: Path) -> list[Path]:
    """Half-written checkpoints, left by processes that were killed while they saved."""
    return sorted(folder.glob(f"{_ASIDE}*"))


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Delete the checkpoints that are not to be kept.

    Args:
        folder: RUN/checkpoints.
        keep: how many of the newest to keep; 0 keeps all.
        newest: the checkpoint just written. Those of later steps are damaged or rolled back, and are deleted too.
    """
    there = list_checkpoints(folder)
    kept = [path for path in there if step_of(path) <= step_of(newest)][-keep:]  # [-0:] is all
    for path in there:
        if path not in kept:
            remove(path)
    for left in folder.glob(f"{_LEAVING}*"):
        shutil.rmtree(left, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a process killed here leaves nothing that looks like one."""
    leaving = path.with_name(f"{_LEAVING}{path.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    shutil.rmtree(path.replace(leaving), ignore_errors=True)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Everything of a checkpoint that is a tensor, by name: parameters, optimiser state and generators, not copied."""
    found = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        found |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
        found["rng.cpu"] = torch.get_rng_state()
        if next(model.parameters()).is_cuda:
            found["rng.cuda"] = torch.cuda.get_rng_state()
    return found


def in_host_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors (DTensors too: of this process's parts) that later training steps do not change."""
    copies = {name: tensor.detach().to("cpu", copy=True, non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _is_step(path: Path, step: Any) -> bool:
    """Whether a value is the step in the checkpoint's name; a copy under another name may have any step."""
    named = _NAME.fullmatch(path.name)
    return type(step) is int and step >= 0 and (named is None or int(named[1]) == step)


def _are_files(files: Any) -> bool:
    """Whether a value is a dict of plain file names: forged JSON must not lead out of the folder."""
    return isinstance(files, dict) and all(re.fullmatch(r"[\w-][\w.-]{0,200}", name, re.ASCII) for name in files)


def _reader(path: Path, names: Collection[str]) -> HuggingFaceStorageReader:
    """A reader of these files only: torch's takes whatever ends in .safetensors, what a system left there too."""
    reader = HuggingFaceStorageReader(str(path))
    everything = reader.fs.ls
    reader.fs.ls = lambda path: [file for file in everything(path) if Path(file).name in names]
    return reader


def _fitting(path: Path, reader: HuggingFaceStorageReader, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Shape and dtype of each tensor in a checkpoint, which must fit those that it is read into."""
    with _damage(path):
        saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name.startswith("rng."):
            continue
        if name not in saved:
            raise UserError(f"{path} has no {name}: it was written by another model or placement")
        if saved[name].size != tensor.shape:
            raise UserError(f"{path}: {name} has shape {list(saved[name].size)}, this model's is {list(tensor.shape)}")
        if saved[name].properties.dtype != tensor.dtype:
            raise DamagedCheckpoint(f"{path}: {name} is {saved[name].properties.dtype}, expected {tensor.dtype}")
    extra = [name for name in saved if name.startswith("model.") and name not in tensors]
    if extra:
        raise UserError(f"{path} holds {extra[0]}, which this model does not have: its config differs")
    return saved


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Report any error inside as damage to the checkpoint."""
    try:
        yield
    except Exception as error:  # from three libraries, whose errors share no base class
        what = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise DamagedCheckpoint(f"{path} cannot be read: {what}") from None


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the first process's own error, such as an OSError of its disk, instead of torch's wrapper around all.

    torch's warning that no process group exists is silenced, for good: `warnings.catch_warnings` is not for threads.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(aside: Path, final: Path, state: dict[str, Any]) -> None:
    """Write state.json and give the folder its name."""
    write_aside(aside / "state.json", json.dumps(state, indent=2) + "\n")
    sync(aside)
    if final.exists():  # it is damaged, else the run would have gone on from it
        remove(final)
    aside.rename(final)
    sync(final.parent)


def _synced_digests(folder: Path, world: World) -> dict[str, dict[str, Any]]:
    """Bring this process's share of the files to the disk; returns their sizes and SHA-256."""
    files = sorted(path for path in folder.iterdir() if not is_stray(path.name))[world.rank :: world.size]
    for file in files:
        sync(file)
    return {file.name: _digest(file) for file in files}


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
