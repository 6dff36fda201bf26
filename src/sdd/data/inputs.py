"""Text to be tokenised: text files, JSON lines, parquet and Hugging Face datasets, as one stream of records.

A record is a document, or a part of a long text. Its place in its input is a number, so that reading can go on there.
"""

import difflib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pydantic

from sdd.data.spec import HUB, existing
from sdd.data.text import ARCHIVES, Cut, Document, blocks, check_utf8, lines, piece_end
from sdd.errors import UserError, require_extra

Kind = Literal["text", "json lines", "parquet", "dataset", "tokens"]
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".md", ".txt.gz", ".md.gz", ".txt.zst", ".md.zst"), "text"),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"), "json lines"),
    **dict.fromkeys((".json", ".json.gz", ".json.zst"), "json lines"),
    ".parquet": "parquet",
    ".npy": "tokens",
    ".bin": "tokens",
}
_AS_IT_IS = ("", ".txt", ".md")  # suffixes of text that is no archive
PART_BYTES = 1 << 21
_ROWS = 256


class Input(pydantic.BaseModel, frozen=True):
    """One file or dataset.

    Attributes:
        name: its path, or hf:NAME:SPLIT.
        kind: how it is read.
        size: of the file in bytes, or as a dataset states it; only ratios of it matter.
        stamp: time of the last change, or a dataset's fingerprint; another stamp may mean another content.
    """

    name: str
    kind: Kind
    size: int
    stamp: str

    @property
    def reading(self) -> str:
        """How the bytes become text: two inputs with the same content and reading have the same text."""
        suffix = _suffix(Path(self.name))
        return "text" if suffix in _AS_IT_IS else suffix

    def content_hash(self) -> str:
        """Hash of a file's bytes, or a dataset's own fingerprint.

        Raises:
            UserError: if the file cannot be read.
        """
        if self.kind == "dataset":
            return self.stamp
        with _reading(self), Path(self.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Record:
    """A document or a part of one.

    Attributes:
        number: of the record in its input, from 1.
        done: how much of the input's size has been read with it.
        data: a JSON line as it was stored, or the text itself.
        continued: whether the same document's part before precedes.
        goes_on: whether the same document's next part follows.
        held_out: whether the record is for validation; None leaves that to the `ChunkTokenizer`.
    """

    number: int
    done: int
    data: bytes
    continued: bool = False
    goes_on: bool = False
    held_out: bool | None = None


def token_files(path: Path, any_name: bool = False) -> list[Path]:
    """The token files that a path names: itself, or all in a folder; none if there is only text.

    Args:
        path: of a file or folder.
        any_name: take a file whose name does not say its kind for tokens.
    """
    if path.is_file():
        return [path] if _KINDS.get(_suffix(path), "tokens" if any_name else "text") == "tokens" else []
    return [file for file in _files_in(path) if _KINDS.get(_suffix(file)) == "tokens" and file.stat().st_size]


def find_inputs(names: Sequence[str], field: str = "text") -> list[Input]:
    """All inputs that are named or lie in a folder that is named, in order.

    Raises:
        UserError: nothing there, nothing readable inside, or a package that is needed is not installed.
    """
    try:
        return [source for name in names for source in _find(name, field)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def records(source: Input, field: str, start: int = 0, cut: Cut | None = None) -> Iterator[Record]:
    """The records of an input after the first `start`, read in bounded memory; `cut` says where long texts are cut.

    Raises:
        UserError: a damaged file, or one without the field.
    """
    read = {"json lines": _json_lines, "parquet": _parquet, "dataset": _dataset}
    with _reading(source):
        yield from _text(source, start, cut) if source.kind == "text" else read[source.kind](source, field, start)


def documents(source: Input, field: str) -> Iterator[tuple[int, Document]]:
    """The documents of an input, each as a whole, with how much of the input's size has been read after it.

    Raises:
        UserError: see `records` and `text_of`.
    """
    if source.kind != "text":
        for record in records(source, field):
            data = text_of(source, record, field)
            yield record.done, Document(place(source, record.number), io.BytesIO(data), len(data))
        return
    path = Path(source.name)
    with _reading(source), path.open("rb") as stored, tempfile.TemporaryFile() as unpacked:
        file = stored
        if path.suffix in ARCHIVES:
            file = unpacked
            unpacked.writelines(blocks(path, stored))
        yield source.size, Document(source.name, file, file.seek(0, os.SEEK_END))


def text_of(source: Input, record: Record, field: str) -> bytes:
    """The UTF-8 text of a record.

    Raises:
        UserError: it holds none.
    """
    name = place(source, record.number)
    if source.kind != "json lines":
        check_utf8(record.data, name)
        return record.data
    try:
        return json.loads(record.data)[field].encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f'{name}: expected a JSON object with a string "{field}"') from None


def place(source: Input, number: int) -> str:
    """The name of a record in messages."""
    if source.kind == "text":
        return source.name if number == 1 else f"{source.name}, part {number}"
    return f"{source.name}, {'line' if source.kind == 'json lines' else 'row'} {number}"


@contextmanager
def _reading(source: Input) -> Iterator[None]:
    """Turn what goes wrong while an input is read into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {source.name}: {error.strerror or _first_line(error)}") from None
    except UnicodeError as error:
        raise UserError(f"{source.name} is not UTF-8 text: {_first_line(error)}") from None


def _suffix(path: Path) -> str:
    """The end of a name that says its kind; empty if it says none."""
    return next((suffix for suffix in _KINDS if path.name.endswith(suffix)), "")


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _find(name: str, field: str) -> list[Input]:
    path = Path(name).expanduser()
    if name.startswith(HUB) and not path.exists():
        return [_dataset_input(name, field)]
    if not path.exists():
        path = existing(name, f"text files, or {HUB}NAME[:SPLIT] for a dataset of the hub")
    if path.is_file():
        return [_file_input(path)]
    if _is_saved(path):
        return [_dataset_input(f"{HUB}{path}", field)]
    # A .json in a folder of data is seldom JSON lines.
    known = [suffix for suffix, kind in _KINDS.items() if kind != "tokens" and suffix != ".json"]
    found = [_file_input(file) for file in _files_in(path) if _suffix(file) in known]
    if not found:
        raise UserError(f"{path} holds neither token files (.npy, .bin) nor text ({', '.join(known)})")
    return found


def _file_input(path: Path) -> Input:
    kind = _KINDS.get(_suffix(path), "text")
    if kind == "tokens":
        raise UserError(f"{path} is a token file, expected text: give it to sdd train --data as it is")
    if kind == "parquet":
        _pyarrow(str(path))
    status = path.stat()
    return Input(name=str(path), kind=kind, size=status.st_size, stamp=str(status.st_mtime_ns))


def _json_lines(source: Input, _field: str, start: int) -> Iterator[Record]:
    path = Path(source.name)
    with path.open("rb") as file:
        for number, line in enumerate(lines(path, file), start=1):
            if number > start and line.strip():
                yield Record(number, file.tell(), line)


def _text(source: Input, start: int, cut: Cut | None) -> Iterator[Record]:
    path = Path(source.name)
    number, data = 1, b""
    with path.open("rb") as file:
        for block in blocks(path, file):
            data += block
            while len(data) > PART_BYTES:
                end = piece_end(data[:PART_BYTES], cut)
                if number > start:
                    yield Record(number, file.tell(), data[:end], continued=number > 1, goes_on=True)
                number, data = number + 1, data[end:]
        if data and number > start:
            yield Record(number, file.tell(), data, continued=number > 1)


def _pyarrow(name: str) -> Any:
    return require_extra("data", "pyarrow.parquet", "pyarrow", needed_by=f"{name} is parquet, which")


def _parquet(source: Input, field: str, start: int) -> Iterator[Record]:
    parquet, arrow = _pyarrow(source.name)
    try:
        with parquet.ParquetFile(source.name) as file:
            _check_field(source.name, field, file.schema_arrow.names)
            total, number = max(1, file.metadata.num_rows), 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= start:
                    number += rows
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[field]):
                    values = _bytes(batch.column(0), arrow).to_pylist()
                    yield from _rows(source, values, number, start, total)
                    number += len(values)
    except arrow.ArrowException as error:
        raise UserError(f"{source.name} is damaged or no parquet file: {_first_line(error)}") from None


def _bytes(column: Any, arrow: Any) -> Any:
    """A column of strings as one of bytes, so that bytes that are not UTF-8 are reported as for any other input."""
    is_text = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
    return column.cast(arrow.large_binary()) if is_text else column


def _rows(source: Input, values: Sequence[Any], before: int, start: int, total: int) -> Iterator[Record]:
    """Rows as records: those that follow the first `before` of `total`, if they come after `start` and hold a text."""
    for number, value in enumerate(values, start=before + 1):
        if number > start and value is not None:
            if not isinstance(value, str | bytes):
                kind = type(value).__name__
                raise UserError(f"{place(source, number)} holds a {kind}, expected text: name another field")
            data = value if isinstance(value, bytes) else value.encode()
            yield Record(number, source.size * number // total, data)


def _check_field(name: str, field: str, there: Sequence[str]) -> None:
    if field not in there:
        close = difflib.get_close_matches(field, there, n=1, cutoff=0.5) or list(there)
        raise UserError(f"{name} has no field {field!r}: choose with --text-field, e.g. {', '.join(close[:8])}")


def _dataset_input(name: str, field: str) -> Input:
    data = _load_dataset(name)
    _check_field(name, field, data.column_names)
    size = getattr(data, "dataset_size", None) or len(data)
    stamp = f"{len(data)} rows, {getattr(data, '_fingerprint', '')}"
    return Input(name=name, kind="dataset", size=size, stamp=stamp)


def _dataset(source: Input, field: str, start: int) -> Iterator[Record]:
    data = _load_dataset(source.name).select_columns([field])
    for first in range(start, len(data), _ROWS):
        yield from _rows(source, data[first : first + _ROWS][field], first, start, len(data))


@lru_cache(maxsize=4)
def _load_dataset(name: str) -> Any:
    """The dataset of hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; NAME may be a folder that save_to_disk wrote."""
    (datasets,) = require_extra("datasets", "datasets", needed_by=name)
    location, *others = re.split(r":(?![^[]*\])", name.removeprefix(HUB))  # not at the colon of train[:10%]
    split = others.pop() if others else "train"
    try:
        if not _is_saved(Path(location)):
            return datasets.load_dataset(location, *others[:1], split=split)
        data = datasets.load_from_disk(location)
    except Exception as error:  # of the hub, the network, the disk: the library has no common base for them
        raise UserError(f"cannot load the dataset {name}: {_first_line(error)}") from None
    if not hasattr(data, "keys"):
        return data
    if split not in data:
        raise UserError(f"{name} has the splits {', '.join(data)}: name one, {HUB}{location}:SPLIT")
    return data[split]


def _is_saved(path: Path) -> bool:
    return any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
