"""TensorBoard, written where the package is installed."""

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any


class TensorBoard:
    """Writes every number of a metrics row as a scalar; without a writer it does nothing.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or None.
    """

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    @classmethod
    def if_present(cls, run: Path, step: int = 0) -> "TensorBoard":
        """A writer into RUN/tensorboard if the package is installed (`pip install sdd[tensorboard]`).

        Args:
            run: the run directory.
            step: where the run stands; later events of an earlier attempt are hidden.
        """
        if importlib.util.find_spec("tensorboard") is None:
            return cls()
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None))

    def log(self, row: dict[str, Any]) -> None:
        """Write the numbers of a row at its step."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
