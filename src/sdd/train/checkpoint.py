"""Checkpoints: torch.distributed.checkpoint over safetensors, written aside and renamed, nothing pickled.

    RUN/checkpoints/step-00000500/
        *.safetensors          parameters, optimiser state and RNG state by name; one file a process, which holds its
                               parts of the matrices; what all processes have alike is in one of them
        state.json             step, tokens, seconds, versions, and size and SHA-256 of every other file

state.json is written last and the folder gets its name after that, so a folder of that name is whole unless the disk
lost it; the recorded sizes and hashes tell.

A checkpoint loads on any number of processes. One RNG state is enough for all: the generators draw nothing but initial
weights, which every process draws alike.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sdd.errors import UserError
from sdd.train.optim import optimizer_tensors
from sdd.train.parallel import ALONE, World

T = TypeVar("T")

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or not what was written."""


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World = ALONE
) -> Path:
    """Write one checkpoint.

    Args:
        folder: RUN/checkpoints, which all processes see.
        model: its parameters are saved by name.
        optimizer: its state is saved by parameter name.
        state: JSON values; must hold "step".
        world: the processes that hold the model; each writes its part.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if the disk refuses, on every process; what was there before stays.
    """
    final = folder / f"step-{state['step']:08d}"
    aside = folder / f".tmp-{final.name}"
    try:
        world.on_main(lambda: _make_empty(aside))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=world.size > 1)
        with _as_ours():
            dcp_save(_tensors(model, optimizer), storage_writer=writer)
        written = world.gather(world.together(lambda: _synced_digests(aside, world)))
        files = dict(sorted(item for part in written for item in part.items()))
        world.on_main(lambda: _complete(aside, final, {"format": FORMAT, **state, "files": files}))
    except BaseException:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, world: World = ALONE
) -> dict[str, Any]:
    """Read a checkpoint into a model and, for going on with training, an optimiser and torch's generators.

    Args:
        path: the checkpoint, written by any number of processes.
        model: takes the parameters.
        optimizer: takes its state, if given.
        world: the processes that hold the model.

    Returns:
        The state that `save_checkpoint` was given.

    Raises:
        DamagedCheckpoint: if a file is missing or changed; this and the next on every process.
        UserError: if it is of another format, or its parameters are not the model's.
    """
    state = world.on_main(lambda: read_state(path))
    world.together(lambda: verify(path, state, world))
    reader = HuggingFaceStorageReader(str(path))
    tensors = _tensors(model, optimizer)
    saved = world.together(lambda: reader.read_metadata().state_dict_metadata)
    world.together(lambda: _check_shapes(path, tensors, saved))
    tensors = {name: tensor for name, tensor in tensors.items() if name in saved}  # all but another device's generator
    with _as_ours():
        dcp_load(tensors, storage_reader=reader)
    if optimizer is not None:
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        DamagedCheckpoint: if it is missing or unreadable.
        UserError: if it is of another format.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DamagedCheckpoint(f"{path} has no readable state.json: it is not a whole checkpoint") from None
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("step"), int)
        or not isinstance(state.get("files"), dict)
    ):
        raise DamagedCheckpoint(f"{path}/state.json lacks step or files: it is not a checkpoint of ours")
    if state.get("format") != FORMAT:
        raise UserError(f"{path} has checkpoint format {state.get('format')!r}, this version reads {FORMAT}")
    return state


def verify(path: Path, state: dict[str, Any], world: World = ALONE) -> None:
    """Compare size and SHA-256 of every file with what was written; several processes share the files.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    for name, expected in _shared(list(state["files"].items()), world):
        file = path / Path(name).name
        if not file.is_file():
            raise DamagedCheckpoint(f"{path}: {name} is missing")
        if _digest(file) != expected:
            raise DamagedCheckpoint(f"{path}: {name} is damaged (size or SHA-256 differ from what was written)")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in RUN/checkpoints, oldest first; half-written ones have another name and are not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all), and what an interrupted save left behind."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    if keep:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    found = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        found |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
        found["rng.cpu"] = torch.get_rng_state()
        if next(model.parameters()).is_cuda:
            found["rng.cuda"] = torch.cuda.get_rng_state()
    return found


def _check_shapes(path: Path, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("rng."):
            continue
        if name not in saved:
            raise UserError(f"{path} has no {name}: it was written by another model or placement")
        if saved[name].size != tensor.shape:
            raise UserError(f"{path}: {name} has shape {list(saved[name].size)}, this model's is {list(tensor.shape)}")
    extra = [name for name in saved if name.startswith("model.") and name not in tensors]
    if extra:
        raise UserError(f"{path} holds {extra[0]}, which this model does not have: its config differs")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(aside: Path, final: Path, state: dict[str, Any]) -> None:
    """Write state.json and give the folder its name."""
    _write_synced(aside / "state.json", json.dumps(state, indent=2))
    if final.exists():  # the same step of an earlier attempt at the same run
        shutil.rmtree(final)
    aside.rename(final)
    _sync(final.parent)


def _synced_digests(folder: Path, world: World) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of this process's share of the files, which are on the disk afterwards."""
    files = _shared(sorted(folder.iterdir()), world)
    for file in files:
        _sync(file)
    return {file.name: _digest(file) for file in files}


def _shared(items: list[T], world: World) -> list[T]:
    return items[world.rank :: world.size]


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_ours() -> Iterator[None]:
    """Silence torch's warning that no process group exists, and raise the error of a disk as the OSError that it was.

    torch raises a BaseException that holds the errors of all processes, on every one of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from None
