"""What `sdd tokenize` reads: text, JSON lines, parquet and Hugging Face datasets, as one stream of records.

A record is a document, or a part of a long text. Its place in its input is a number, so that reading can go on there.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from sdd.data.text import JSONL_SUFFIXES, blocks, json_text, lines, piece_end
from sdd.errors import UserError, require_extra

JSON_LINES = (*JSONL_SUFFIXES, ".ndjson", ".ndjson.gz", ".ndjson.zst")
TEXT = (".txt", ".md", ".txt.gz", ".txt.zst", ".md.gz", ".md.zst")
PARQUET = (".parquet",)
HUB = "hf:"
PART_BYTES = 1 << 21
_ROWS = 256


@dataclass(frozen=True)
class Input:
    """One file or dataset.

    Attributes:
        name: its path, or hf:NAME:SPLIT.
        kind: how it is read.
        size: of the file in bytes, or what a dataset says of itself; only ratios of it matter.
        stamp: time of the last change, or a dataset's fingerprint, by which a changed one is known.
    """

    name: str
    kind: Literal["text", "json lines", "parquet", "dataset"]
    size: int
    stamp: str

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Record:
    """A document or a part of one, still as it was stored.

    Attributes:
        number: of the record in its input, from 1.
        done: how much of the input's size has been read with it.
        data: a JSON line, or the text itself.
        goes_on: whether the same document's next part follows.
    """

    number: int
    done: int
    data: bytes
    goes_on: bool = False


def find_inputs(names: Sequence[str], field: str) -> list[Input]:
    """All inputs that are named or lie in a directory that is named, in order.

    Raises:
        UserError: nothing there, nothing readable inside, or a package that is needed is not installed.
    """
    try:
        found = [one for name in names for one in _find(name, field)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    for one in found:
        if one.kind == "parquet":
            _pyarrow(one.name)
    return found


def records(source: Input, field: str, start: int = 0) -> Iterator[Record]:
    """The records of an input after the first `start`, read in bounded memory.

    Raises:
        UserError: a damaged file, or one without the field.
    """
    read = {"text": _text, "json lines": _json_lines, "parquet": _parquet, "dataset": _dataset}[source.kind]
    try:
        yield from read(source, field, start)
    except OSError as error:
        raise UserError(f"cannot read {source.name}: {error.strerror or _first_line(error)}") from None
    except UnicodeError as error:
        raise UserError(f"{source.name} is not UTF-8 text: {_first_line(error)}") from None


def text_of(source: Input, number: int, data: bytes, field: str) -> bytes:
    """The UTF-8 text of a record.

    Raises:
        UserError: it holds none.
    """
    name = place(source, number)
    if source.kind == "json lines":
        return json_text(data, field, name)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start}): convert it, e.g. iconv -f latin1 -t utf-8"
        ) from None
    return data


def place(source: Input, number: int) -> str:
    """Where a record stands, for messages."""
    what = {"text": "part", "json lines": "line", "parquet": "row", "dataset": "row"}[source.kind]
    return source.name if source.kind == "text" and number == 1 else f"{source.name}, {what} {number}"


def _find(name: str, field: str) -> list[Input]:
    path = Path(name).expanduser()
    if name.startswith(HUB) and not path.exists():
        return [_dataset_input(name, field)]
    if path.is_file():
        return [_file_input(path)]
    if not path.is_dir():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, there, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"a dataset of the hub is {HUB}NAME[:SPLIT]"
        raise UserError(f"nothing at {path}: {hint}")
    if _is_saved(path):
        return [_dataset_input(f"{HUB}{path}", field)]
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    known = (*TEXT, *JSON_LINES, *PARQUET)  # no .json: those beside data seldom are JSON lines
    found = [_file_input(file) for file in inside if file.name.endswith(known)]
    if not found:
        raise UserError(f"{path} holds no text, JSON lines or parquet ({', '.join(known)})")
    return found


def _file_input(path: Path) -> Input:
    kind = "parquet" if path.name.endswith(PARQUET) else "text"
    if path.name.endswith((*JSON_LINES, ".json")):
        kind = "json lines"
    status = path.stat()
    return Input(str(path), kind, status.st_size, str(status.st_mtime_ns))


def _json_lines(source: Input, field: str, start: int) -> Iterator[Record]:
    path = Path(source.name)
    with path.open("rb") as file:
        for number, line in enumerate(lines(path, file), start=1):
            if number > start and line.strip():
                yield Record(number, file.tell(), line)


def _text(source: Input, field: str, start: int) -> Iterator[Record]:
    path = Path(source.name)
    number, data = 0, b""
    with path.open("rb") as file:
        for block in blocks(path, file):
            data += block
            while len(data) > PART_BYTES:
                end = piece_end(data[:PART_BYTES])
                number += 1
                if number > start:
                    yield Record(number, file.tell(), data[:end], goes_on=True)
                data = data[end:]
        if data and number + 1 > start:
            yield Record(number + 1, file.tell(), data)


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
                    for value in _bytes(batch.column(0), arrow).to_pylist():
                        number += 1
                        if number > start and value is not None:
                            yield Record(number, source.size * number // total, _encoded(source, number, value))
    except arrow.ArrowException as error:
        raise UserError(f"{source.name} is damaged or no parquet file: {_first_line(error)}") from None


def _bytes(column: Any, arrow: Any) -> Any:
    """A column of strings as one of bytes: what is no UTF-8 is then told like that of any other input."""
    is_text = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
    return column.cast(arrow.large_binary()) if is_text else column


def _encoded(source: Input, number: int, value: Any) -> bytes:
    if not isinstance(value, str | bytes):
        raise UserError(f"{place(source, number)} holds a {type(value).__name__}, expected text: name another field")
    return value if isinstance(value, bytes) else value.encode()


def _check_field(name: str, field: str, there: Sequence[str]) -> None:
    if field not in there:
        close = difflib.get_close_matches(field, there, n=1, cutoff=0.5) or list(there)
        raise UserError(f"{name} has no field {field!r}: choose with --text-field, e.g. {', '.join(close[:8])}")


def _dataset_input(name: str, field: str) -> Input:
    data = _load_dataset(name)
    _check_field(name, field, data.column_names)
    size = getattr(data, "dataset_size", None) or len(data)
    return Input(name, "dataset", size, f"{len(data)} rows, {getattr(data, '_fingerprint', '')}")


def _dataset(source: Input, field: str, start: int) -> Iterator[Record]:
    data = _load_dataset(source.name).select_columns([field])
    for first in range(start, len(data), _ROWS):
        values = data[first : first + _ROWS][field]
        for number, value in enumerate(values, start=first + 1):
            if value is not None:
                yield Record(number, source.size * number // len(data), _encoded(source, number, value))


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
