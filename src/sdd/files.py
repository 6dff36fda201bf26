"""Files that are whole or absent whatever happens meanwhile, JSON with non-finite numbers, and locked folders."""

import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sdd.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; there nothing guards a folder against a second process
    fcntl = None

_log = logging.getLogger(__name__)
_ASIDE = re.compile(r"\.tmp-(?P<name>.+)-(?P<process>[0-9]+)-[0-9]+")
_STRAY = re.compile(
    r"#.*#|.*\.(swp|swo|bak|orig)|thumbs\.db|desktop\.ini|__macosx|__pycache__", re.IGNORECASE | re.DOTALL
)


def write_aside(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file as a whole: written under another name, brought to the disk, and renamed.

    Args:
        path: the file.
        content: bytes, or text that becomes UTF-8.
        durable: wait until the disk has it; without, a power cut may leave the file empty.

    Raises:
        OSError: if the disk refuses; the file is then as it was before.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with aside(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file gets its own name at the end, or is deleted after an exception.

    The name is this process's own, so that several may replace one file: the last one wins.

    Raises:
        OSError: with the name of `path`, if the disk refuses.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def aside_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into; it gets that name at the end, or is deleted after an exception.

    Raises:
        UserError: if something is there already, or the folder cannot be made.
    """
    _check_absent(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{threading.get_ident()}")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".tmp-*"):
            found = _ASIDE.fullmatch(left.name)
            if found and found["name"] == path.name and not _is_alive(int(found["process"])):
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
    try:
        with naming(path):
            yield temporary
            _check_absent(path)  # another process may have been faster
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def _check_absent(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists: name a new folder")


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Delete what `aside` was writing in processes that were killed.

    Files of a process that still runs on this machine stay. The caller must know that no other machine writes them.

    Args:
        folder: where.
        names: of the files that were to be replaced.
    """
    for path in folder.glob(".tmp-*"):
        found = _ASIDE.fullmatch(path.name)
        if found and found["name"] in names and not _is_alive(int(found["process"])):
            with suppress(OSError):
                path.unlink()


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to someone else
        return True
    return True


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that a killed process left unfinished is passed over."""
    with file.open("rb") as stream:
        yield from parse_json_lines(stream)


def parse_json_lines(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """The objects among lines of JSON; what is not a whole object is passed over."""
    for line in lines:
        text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, or what it holds is no object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def finite(value: Any, digits: int | None = None) -> Any:
    """A value that JSON can hold: the strings "nan", "inf" and "-inf" for the numbers that it lacks.

    Args:
        value: of dicts, lists, tuples and what stands in them.
        digits: significant digits to which floats are rounded; None for all.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: finite(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, digits) for item in value]
    return value


def number(value: Any) -> float:
    """A number of a JSON file as float; "nan", "inf" and "-inf" are numbers, anything else is nan."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError raised inside: the error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk.

    Raises:
        OSError: if it cannot be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> IO[str]:
    """Keep other processes out of the folder of this file until it is closed or this process ends, however it ends.

    Raises:
        UserError: if another process has it.
        OSError: if the file cannot be opened for writing.
    """
    file = path.open("a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another process is writing into {path.parent}: wait for it or stop it") from None
    except OSError as error:  # some file systems of clusters
        _log.warning("%s cannot be locked (%s): take care that only one process writes there", path, error.strerror)
    return file


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by a system or an editor: never content."""
    return name.startswith((".", "~$")) or name.endswith("~") or bool(_STRAY.fullmatch(name))
