"""Token files that grow chunk by chunk and survive being killed at any moment.

During the work a folder holds `train-00000.npy.part`, ..., `validation.npy.part` and `progress.json`, which counts the
good tokens of each file and the records that have been read. Tokens reach the disk before the progress that counts
them, so whatever lies beyond the count is cut off when the work goes on. At the end the files get their names and their
json, and `progress.json` becomes `summary.json`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydantic

from sdd.data.token_file import TokenInfo
from sdd.errors import UserError
from sdd.files import write_aside

PROGRESS_FILE = "progress.json"
SUMMARY_FILE = "summary.json"
SHARD_TOKENS = 2**30


class Counts(pydantic.BaseModel):
    """The contents of a token file so far, in numbers.

    `n_bytes` counts the text that has tokens, `n_lost` the bytes for which the tokenizer has none.
    """

    n_tokens: int = pydantic.Field(default=0, ge=0)
    n_bytes: int = pydantic.Field(default=0, ge=0)
    n_documents: int = pydantic.Field(default=0, ge=0)
    n_lost: int = pydantic.Field(default=0, ge=0)

    def add(self, other: "Counts") -> None:
        """Add what was appended."""
        self.n_tokens += other.n_tokens
        self.n_bytes += other.n_bytes
        self.n_documents += other.n_documents
        self.n_lost += other.n_lost


class Position(pydantic.BaseModel, frozen=True):
    """How far the inputs have been read.

    Attributes:
        input: number of the input.
        record: records read of it.
        done: how much of the inputs' size has been read.
        n_bytes: bytes of all records read, as they were stored.
        checksum: CRC-32 of the records read of this input; 0 if an earlier version began the folder.
    """

    input: int = pydantic.Field(default=0, ge=0)
    record: int = pydantic.Field(default=0, ge=0)
    done: int = pydantic.Field(default=0, ge=0)
    n_bytes: int = pydantic.Field(default=0, ge=0)
    checksum: int = pydantic.Field(default=0, ge=0)


class Progress(pydantic.BaseModel):
    """progress.json, and in the end summary.json.

    Attributes:
        position: how far the inputs have been read.
        train, validation: the files' contents.
        skipped: records that were no text.
        without_text: records whose field is null or missing.
        seconds: time that the work has taken.
    """

    position: Position = Position()
    train: list[Counts] = pydantic.Field(default_factory=lambda: [Counts()], min_length=1)
    validation: Counts = pydantic.Field(default_factory=Counts)
    skipped: int = pydantic.Field(default=0, ge=0)
    without_text: int = pydantic.Field(default=0, ge=0)
    seconds: float = pydantic.Field(default=0, ge=0)

    def files(self) -> list[tuple[str, Counts]]:
        """The token files' names and contents."""
        train = [(f"train-{number:05d}.npy", counts) for number, counts in enumerate(self.train)]
        return [*train, ("validation.npy", self.validation)]

    def total(self) -> Counts:
        """The counts of all files together."""
        total = Counts()
        for counts in (*self.train, self.validation):
            total.add(counts)
        return total


@dataclass(frozen=True)
class Tokens:
    """Encoded text as a token file stores it."""

    data: bytes
    counts: Counts


class Shards:
    """The files of one folder. They are written by one process, which holds the folder's lock.

    Args:
        folder: where.
        info: the content of the files' json, except for the counts.
        progress: where to go on.
        shard_tokens: a training file that has so many is followed by a new one.

    Raises:
        UserError: files that are shorter than the progress says.
    """

    def __init__(self, folder: Path, info: TokenInfo, progress: Progress, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.progress = folder, progress
        self._info = info
        self._shard_tokens = shard_tokens
        self._width = np.dtype(info.dtype).itemsize
        for name, counts in progress.files():
            self._restore(name, counts)
        self._train = self._part(self._train_name).open("ab")
        self._validation = self._part("validation.npy").open("ab")

    @property
    def _train_name(self) -> str:
        return f"train-{len(self.progress.train) - 1:05d}.npy"

    def append(
        self, train: Tokens, validation: Tokens, position: Position, *, skipped: int = 0, without_text: int = 0
    ) -> None:
        """Take the tokens of a chunk; they count once `commit` has returned."""
        if self.progress.train[-1].n_tokens >= self._shard_tokens:
            _sync(self._train)
            self._train.close()
            self.progress.train.append(Counts())
            self._train = self._part(self._train_name).open("wb")  # one from before a crash does not count
        self._train.write(train.data)
        self._validation.write(validation.data)
        self.progress.train[-1].add(train.counts)
        self.progress.validation.add(validation.counts)
        self.progress.position = position
        self.progress.skipped += skipped
        self.progress.without_text += without_text

    def commit(self) -> None:
        """Bring all that was appended to disk, then the progress."""
        _sync(self._train)
        _sync(self._validation)
        write_aside(self.folder / PROGRESS_FILE, self.progress.model_dump_json(indent=2) + "\n")

    def close(self) -> None:
        """Close the files; tokens that were not committed are lost."""
        self._train.close()
        self._validation.close()

    def finish(self) -> None:
        """Commit, and give the files their names."""
        self.commit()
        self.close()
        for name, counts in self.progress.files():
            part, path = self._part(name), self.folder / name
            if counts.n_tokens:
                part.replace(path)
                info = self._info.model_copy(update=counts.model_dump())
                write_aside(path.with_suffix(".json"), info.model_dump_json(indent=2) + "\n")
            else:
                part.unlink(missing_ok=True)
        (self.folder / PROGRESS_FILE).replace(self.folder / SUMMARY_FILE)

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def _restore(self, name: str, counts: Counts) -> None:
        """Bring a file back to the state that the progress describes."""
        part, final = self._part(name), self.folder / name
        if final.is_file() and not part.exists():  # killed while finishing
            final.replace(part)
        expected = counts.n_tokens * self._width
        found = part.stat().st_size if part.is_file() else 0
        if found < expected:
            raise UserError(
                f"{part} holds {found:,} bytes, {PROGRESS_FILE} counts {expected:,}: it was damaged; delete "
                f"{self.folder} and start again"
            )
        if found > expected:
            os.truncate(part, expected)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
