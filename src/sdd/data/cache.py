"""A directory for results that are computed once, safe for processes that race for them."""

import atexit
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sdd.errors import UserError

T = TypeVar("T")
Notify = Callable[[str], None]


def cache_dir(notify: Notify) -> Path:
    """$SDD_CACHE, else $XDG_CACHE_HOME/sdd, else ~/.cache/sdd; a temporary directory if that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # os.path.expanduser, for Path.expanduser raises where there is no home
    path = Path(os.path.expanduser(os.environ.get("SDD_CACHE") or f"{base}/sdd"))  # noqa: PTH111
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        fallback = _temporary()
        notify(f"the cache {path} cannot be written ({error.strerror}), using {fallback}; SDD_CACHE names another")
        return fallback
    return path


def cached(key: str, build: Callable[[Path], None], load: Callable[[Path], T], notify: Notify) -> T:
    """`load` the cache's entry `key`, after `build` has filled it if it is missing or damaged.

    An entry is a directory, built under another name and renamed when complete; of two processes that build the same
    one the first wins and both read its work.

    Args:
        key: the entry's name, with a hash of all that the content depends on.
        build: fills the empty directory that it is given.
        load: reads an entry; raises UserError if it is damaged.
        notify: receives one line if the cache cannot be used.
    """
    root = cache_dir(notify)
    entry = root / key
    if entry.is_dir():
        try:
            return load(entry)
        except UserError:
            shutil.rmtree(entry, ignore_errors=True)
    unfinished = root / f".{key}.{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        build(unfinished)
        try:
            unfinished.rename(entry)
        except OSError:
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load(entry)


@functools.cache
def _temporary() -> Path:
    path = tempfile.mkdtemp(prefix="sdd-cache-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)
