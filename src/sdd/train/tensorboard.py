"""TensorBoard, written where the package is installed."""

import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from sdd.files import naming


class TensorBoard:
    """Writes every number of a metrics row as a scalar; without a writer it does nothing.

    A run does not end because its curves cannot be drawn: the first error is told, and then nothing more is written.

    Args:
        writer: an `EventFile`, or None.
        say: receives one line if something cannot be written.
    """

    def __init__(self, writer: Any = None, say: Callable[[str], None] = print) -> None:
        self._writer = writer
        self._say = say

    @classmethod
    def if_present(cls, run: Path, step: int = 0, say: Callable[[str], None] = print) -> "TensorBoard":
        """A writer into RUN/tensorboard if the package is installed (`pip install sdd[tensorboard]`).

        Args:
            run: the run directory.
            step: where the run stands; later events of an earlier attempt are hidden.
            say: see above.
        """
        if importlib.util.find_spec("tensorboard") is None:
            return cls()
        try:
            return cls(EventFile(run / "tensorboard", step), say)
        except Exception as error:  # of the disk, or of a package that does not fit its own dependencies
            return cls(None, say)._give_up(error)

    def log(self, row: dict[str, Any]) -> None:
        """Write the numbers of a row at its step."""
        if self._writer is None:
            return
        scalars = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        try:
            self._writer.add(scalars, int(scalars.pop("step")))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> "TensorBoard":
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        self._say(f"TensorBoard gets nothing from here on ({why}); the run goes on")
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        return self

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()


class EventFile:
    """A new file of TensorBoard events, on the disk after each.

    `torch.utils.tensorboard` writes from a thread, which tells an error of the disk by a traceback of its own, late.

    Args:
        folder: where; made if missing.
        step: events of earlier files after this step are hidden; 0 hides none.

    Raises:
        OSError: as `add`, if the disk refuses.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        event_pb2: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary_pb2: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        from tensorboard.summary.writer.record_writer import RecordWriter  # pyright: ignore[reportMissingImports]

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._file = self._path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        try:
            self._write(self._event(file_version="brain.Event:2"))
            if step:
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._write(self._event(step=step + 1, session_log=start))
        except OSError:
            self.close()
            raise

    def add(self, scalars: dict[str, float], step: int) -> None:
        """Write numbers by name, all of one step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with naming(self._path):
            self._records.write(event.SerializeToString())
