"""Checkpoints: torch.distributed.checkpoint over safetensors, written aside and renamed, nothing pickled.

    RUN/checkpoints/step-00000500/
        *.safetensors          parameters, optimiser state and RNG state by name
        state.json             step, tokens, seconds, versions, and size and SHA-256 of every other file

state.json is written last and the folder gets its name after that, so a folder of that name is whole unless the disk
lost it; the recorded sizes and hashes tell.
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sdd.errors import UserError
from sdd.train.optim import optimizer_tensors

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or not what was written."""


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write one checkpoint.

    Args:
        folder: RUN/checkpoints.
        model: its parameters are saved by name.
        optimizer: its state is saved by parameter name.
        state: JSON values; must hold "step".

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if the disk refuses; what was there before stays.
    """
    final = folder / f"step-{state['step']:08d}"
    aside = folder / f".tmp-{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with _single_process():
            dcp_save(_tensors(model, optimizer), storage_writer=HuggingFaceStorageWriter(str(aside)))
        files = {file.name: _digest(file) for file in sorted(aside.iterdir())}
        _write_synced(aside / "state.json", json.dumps({"format": FORMAT, **state, "files": files}, indent=2))
        for file in files:
            _sync(aside / file)
        if final.exists():  # the same step of an earlier attempt at the same run
            shutil.rmtree(final)
        aside.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Read a checkpoint into a model and, for going on with training, an optimiser and torch's generators.

    Returns:
        The state that `save_checkpoint` was given.

    Raises:
        DamagedCheckpoint: if a file is missing or changed.
        UserError: if it is of another format, or its parameters are not the model's.
    """
    state = read_state(path)
    verify(path, state)
    tensors = _tensors(model, optimizer)
    reader = HuggingFaceStorageReader(str(path))
    _check_shapes(path, tensors, reader.read_metadata().state_dict_metadata)
    with _single_process():
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


def verify(path: Path, state: dict[str, Any]) -> None:
    """Compare size and SHA-256 of every file with what was written.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    for name, expected in state["files"].items():
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
def _single_process() -> Iterator[None]:
    """Silence torch's warning that no process group exists: a run of one process is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
