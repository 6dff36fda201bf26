"""Files that are whole or not there, whatever happens meanwhile, and folders that one process writes into."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sdd.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; there nothing guards a folder against a second process
    fcntl = None

_log = logging.getLogger(__name__)


def write_aside(path: Path, text: str) -> None:
    """Replace a small file: written under another name, brought to the disk, and renamed.

    Raises:
        OSError: if the disk refuses; the file is then as it was before.
    """
    aside = path.with_name(f".tmp-{path.name}")
    with naming(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError from inside name the file: that of a full disk does not say where."""
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
