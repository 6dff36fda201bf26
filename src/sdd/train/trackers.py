"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

No package is imported before its tracker is opened. No error of a tracker ends a run: the first is reported, and
nothing more is given to it.
"""

import importlib
import importlib.util
import inspect
import os
import re
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from sdd.errors import DISTRIBUTION, MissingPackage, UserError, nearest, one_line
from sdd.files import naming, read_json_object

#: The trackers that can be asked for, and the packages they need; each package's extra has the tracker's name.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
#: Names the tracker of a run, and the run there, so that a resumed run goes on in the same one.
FILE = "tracker.json"
_PROJECT = "sdd"


def check_tracker(name: str) -> str:
    """Return the name of a tracker, or "none".

    Raises:
        UserError: if there is none of that name.
        MissingPackage: if its package is not installed.
    """
    if name != "none" and name not in TRACKERS:
        known = ", ".join((*TRACKERS, "none"))
        raise UserError(f"no tracker {name!r}{nearest(name, TRACKERS)}; choose one of {known}")
    if name != "none" and importlib.util.find_spec(TRACKERS[name]) is None:
        raise MissingPackage(f"--tracker {name} needs {TRACKERS[name]}: pip install '{DISTRIBUTION}[{name}]'")
    return name


def tracked(run: Path, asked: str | None) -> dict[str, str]:
    """What tracker.json is to say: the tracker that is asked for, or the one that the run has; empty for the default.

    A run gets one id for each tracker, made of its folder's name and the time.
    """
    before = {key: str(value) for key, value in read_json_object(run / FILE).items()}
    kind = asked or before.get("tracker")
    if kind not in (*TRACKERS, "none"):
        return {}
    if kind == before.get("tracker") and before.get("id"):
        return before
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", run.resolve().name)[:40] or "run"
    return {"tracker": kind, "id": f"{name}-{int(time.time()):x}{os.getpid() % 4096:03x}"}


def open_tracker(
    run: Path, names: dict[str, str], step: int, config: dict[str, Any], say: Callable[[str], None]
) -> "Tracker":
    """The tracker of a run; TensorBoard, where it is installed, for one that has not been asked for another.

    Args:
        run: its directory.
        names: the content of its tracker.json.
        step: steps done.
        config: the run's settings by dotted name.
        say: receives a line if something cannot be written.
    """
    kind = names.get("tracker")
    if kind == "wandb":
        return WandB(run, names["id"], config, say)
    if kind == "trackio":
        return Trackio(names["id"], config, say)
    return TensorBoard(None if kind == "none" else run / "tensorboard", step, say)


class Tracker(ABC):
    """Receives the rows of metrics.jsonl.

    Args:
        say: receives one line, if something goes wrong.
    """

    label = ""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._open = say, True

    def log(self, row: dict[str, Any]) -> None:
        """Record the numbers of a row at its step."""
        if not self._open:
            return
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        step = int(numbers.pop("step"))
        try:
            self._log(step, numbers)
        except Exception as error:
            self._give_up(error)

    @abstractmethod
    def _log(self, step: int, numbers: dict[str, float]) -> None:
        """Hand numbers to the tracker."""

    @abstractmethod
    def _close(self) -> None:
        """End the tracked run."""

    def _give_up(self, error: Exception) -> None:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        self._open = False
        self._say(f"{self.label} gets nothing from here on ({one_line(why)[:300]}); the run goes on")
        try:
            self._close()
        except Exception:  # already said
            return

    def close(self) -> None:
        """Let go of it; nothing more is recorded."""
        if self._open:
            try:
                self._close()
            except Exception as error:
                self._give_up(error)
        self._open = False

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WandB(Tracker):
    """Weights & Biases: a run of the project `sdd` (or WANDB_PROJECT), in mode WANDB_MODE.

    Without WANDB_MODE it is offline where there is no key, or no server that takes it: into RUN/wandb, for `wandb
    sync`. It never asks for a key. A resumed run goes on in the same one; steps that it takes again are those that are
    there.

    Args:
        run: the run directory.
        name: id of the run there.
        config: settings, by dotted name.
        say: see `Tracker`.
    """

    label = "W&B"

    def __init__(self, run: Path, name: str, config: dict[str, Any], say: Callable[[str], None]) -> None:
        super().__init__(say)
        try:
            library: Any = importlib.import_module("wandb")
            mode = os.environ.get("WANDB_MODE") or _mode(library)
            self._run = library.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                id=name,
                name=run.resolve().name,
                dir=str(run),
                config=config,
                resume="allow",
                mode=mode,
                settings=library.Settings(silent=True, console="off", init_timeout=30, finish_timeout=60),
            )
        except Exception as error:
            self._give_up(error)
            return
        if mode == "offline":
            say(f"W&B writes into {run}/wandb; send it later with: wandb sync {run}/wandb/offline-run-*")

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def _close(self) -> None:
        if hasattr(self, "_run"):
            self._run.finish()


def _mode(library: Any) -> str:
    if "prompt" not in inspect.signature(library.login).parameters:  # an older version
        return "online" if library.api.api_key else "offline"
    try:
        return "online" if library.login(prompt=False) else "offline"
    except Exception:  # it says itself why it cannot get in
        return "offline"


class Trackio(Tracker):
    """trackio: a run of the project `sdd` (or TRACKIO_PROJECT) in TRACKIO_DIR, for `trackio show` and `trackio sync`.

    Args:
        name: of the run there; a resumed run goes on in the same one.
        config: settings, by dotted name.
        say: see `Tracker`.
    """

    label = "trackio"

    def __init__(self, name: str, config: dict[str, Any], say: Callable[[str], None]) -> None:
        super().__init__(say)
        try:
            self._library: Any = importlib.import_module("trackio")
            project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
            with redirect_stdout(sys.stderr):  # what it prints is no part of a command's answer
                self._run = self._library.init(project=project, name=name, config=config, resume="allow", embed=False)
        except Exception as error:
            self._give_up(error)

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        numbers.pop("time", None)  # trackio has its own, and warns at another
        self._run.log(numbers, step=step)

    def _close(self) -> None:
        if hasattr(self, "_run"):
            with redirect_stdout(sys.stderr):
                self._library.finish()


class TensorBoard(Tracker):
    """Writes every number of a metrics row as a scalar, on the disk after each row.

    Without a folder, or where the package is not installed (`pip install sdd-torch[tensorboard]`), nothing is written.
    `torch.utils.tensorboard` is not used: it writes from a thread, which reports a full disk late and by a traceback.

    Args:
        folder: a new file of events is made in it; made if missing.
        step: steps done; later events of an earlier attempt are hidden.
        say: receives one line if something cannot be written.
    """

    label = "TensorBoard"

    def __init__(self, folder: Path | None = None, step: int = 0, say: Callable[[str], None] = print) -> None:
        super().__init__(say)
        self._file = None
        if folder is None or importlib.util.find_spec("tensorboard") is None:
            self._open = False
            return
        try:
            self._begin(folder, step)
        except Exception as error:  # from the disk, or from a package that does not fit its own dependencies
            self._give_up(error)

    def _begin(self, folder: Path, step: int) -> None:
        event_pb2: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary_pb2: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        writer: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._records = writer.RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if step:
            self._write(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step=step, summary=self._summary(value=values))

    def _write(self, **event: Any) -> None:
        assert self._file is not None
        with naming(Path(self._file.name)):
            self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
