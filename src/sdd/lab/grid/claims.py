"""Claims: which machine does which run, where several machines share a folder.

    CLAIMS/NAME/0/owner.json    the first claim on the run NAME
    CLAIMS/NAME/1/owner.json    the next, after the first was given up or its owner was lost; the highest number counts

A claim is a folder, made aside and renamed to its place. Renaming a folder onto one that is not empty fails, so only
one of several machines gets the claim, on shared file systems as well. Claims are never deleted, so that none can be
mistaken for another. An owner renews its claims; a claim that was not renewed for a while, by the observer's own clock,
is lost.
"""

import errno
import json
import os
import platform
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from sdd.files import read_json_object, write_aside
from sdd.terminal import Interval

_RENEW_SECONDS = 10.0
_LOST_SECONDS = 120.0


class Claims:
    """This process's claims in a folder.

    Args:
        folder: seen by all machines; made when the first claim is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = {"owner": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid(), "processes": _processes()}
        self._held: dict[str, Path] = {}
        self._beat = 0
        self._renewal = Interval(_RENEW_SECONDS)
        self._seen: dict[str, tuple[Path, Any, float]] = {}

    def take(self, name: str) -> bool:
        """Claim a run; returns whether this process now has it, from now on or from before."""
        if name in self._held:
            return True
        newest = self._newest(name)
        if newest is not None and not self._is_free(name, newest):
            return False
        place = self._folder / name / str(0 if newest is None else int(newest.name) + 1)
        aside = self._folder / f".{uuid.uuid4().hex}"
        aside.mkdir(parents=True)
        self._write(aside)
        place.parent.mkdir(exist_ok=True)
        try:
            aside.rename(place)
        except OSError as error:
            shutil.rmtree(aside)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        self._held[name] = place
        return True

    def release(self, name: str) -> None:
        """Give a claim up, so that other machines need not wait."""
        place = self._held.pop(name, None)
        if place is not None and place == self._newest(name):
            self._write(place, released=True)

    def renew(self) -> list[str]:
        """Renew all claims if that is due.

        Returns:
            Runs that another machine has taken meanwhile; this process no longer has them.
        """
        if not self._renewal.due():
            return []
        self._beat += 1
        lost = [name for name, place in self._held.items() if self._newest(name) != place]
        for name in lost:
            del self._held[name]
        for place in self._held.values():
            self._write(place)
        return lost

    def _newest(self, name: str) -> Path | None:
        found = [path for path in (self._folder / name).glob("*") if path.name.isdecimal()]
        return max(found, key=lambda path: int(path.name), default=None)

    def _is_free(self, name: str, claim: Path) -> bool:
        """Whether the owner of a claim has given it up, has ended, or has not renewed it for long."""
        owner = read_json_object(claim / "owner.json")  # empty while it is written, or if it is damaged: wait
        if owner.get("released") or self._has_ended(owner):
            return True
        last = self._seen.get(name)
        if last is None or last[:2] != (claim, owner.get("beat")):
            self._seen[name] = (claim, owner.get("beat"), time.monotonic())
            return False
        return time.monotonic() - last[2] > _LOST_SECONDS

    def _has_ended(self, owner: dict[str, Any]) -> bool:
        """Whether the owner was a process of this machine and has ended; of other machines nothing is known."""
        here = all(owner.get(key) == self._me[key] for key in ("host", "processes"))
        return here and not _is_alive(int(owner["pid"]))

    def _write(self, place: Path, released: bool = False) -> None:
        owner = {**self._me, "beat": self._beat, "released": released}
        write_aside(place / "owner.json", json.dumps(owner), durable=False)


def _processes() -> str:
    """Identify the space of process numbers: containers may share a host's name but not its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
