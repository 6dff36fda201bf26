"""Disks that refuse, for real: the errors come from the kernel."""

import os
import resource
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from sdd.files import aside


@contextmanager
def no_file_larger_than(n_bytes):
    """Inside, this process's writes beyond that size of a file fail; one that crosses it is cut short there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk_for(path):
    """Inside, this thread meets a full disk (ENOSPC) when it replaces the file by `write_aside`."""
    with suppress(FileNotFoundError), aside(path) as temporary:
        temporary.symlink_to("/dev/full")
        try:
            yield
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def shared_folder():
    """A temporary folder that other users can look into."""
    folder = Path(tempfile.mkdtemp(prefix="sdd-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def read_only(folder):
    """Inside, a folder and what is in it cannot be written; modes do not bind root, who is another user meanwhile."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)
