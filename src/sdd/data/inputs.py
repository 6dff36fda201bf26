"""Text to be tokenised: text files, JSON lines, parquet and Hugging Face datasets, as one stream of records.

A record is a document, or a part of a long text. Its place in its input is a number, so that reading can go on there.
"""

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from sdd.data import tables
from sdd.data.cache import Notify
from sdd.data.fields import ABSENT, BadRecord, kind_of_value, lookup, names_in, parse_json, text_in_json
from sdd.data.folders import Folder, named, part_of, search, what_we_wrote
from sdd.data.kinds import TEXT_KINDS, Kind, kind_of, refuse_other_kinds, suffix_of
from sdd.data.spec import HUB, existing, is_mixture
from sdd.data.text import Cut, Document, check_utf8, piece_end
from sdd.data.unpack import BOM, blocks, lines, packing
from sdd.errors import UserError, one_line

_AS_IT_IS = ("", ".txt", ".md")  # suffixes of text that is not packed
_LINES_WITHOUT_FIELD = 10_000  # after so many, a field is taken to be misspelt
PART_BYTES = 1 << 21


class Input(pydantic.BaseModel, frozen=True):
    """One file or dataset.

    Attributes:
        name: its path, or hf:NAME:SPLIT.
        kind: how it is read.
        size: of the file in bytes, or as a dataset states it; only ratios of it matter.
        stamp: time of the last change, or a dataset's fingerprint; another stamp may mean another content.
        held_out: whether all of it is for validation.
        taken: records that were read before it was taken away in mid-work; None if it is there.
    """

    name: str
    kind: Kind
    size: int
    stamp: str
    held_out: bool = False
    taken: int | None = None

    @property
    def reading(self) -> str:
        """How the bytes become text: two inputs with the same content and reading have the same text."""
        path = Path(self.name)
        suffix = suffix_of(path)
        if suffix not in _AS_IT_IS:
            return suffix
        marked = self.kind == "text" and not packing(path) and _begins_with_mark(path)
        return "text after a byte order mark" if marked else "text"

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
        missing: rows without text, up to this one, that it stands for; it holds none then.
        fault: what the record is, if it is known to be no text.
    """

    number: int
    done: int
    data: bytes
    continued: bool = False
    goes_on: bool = False
    held_out: bool | None = None
    missing: int = 0
    fault: str = ""


def token_files(path: Path, any_name: bool = False, notify: Notify | None = None) -> list[Path]:
    """The token files that a path names: itself, or all in a folder; none if there is only text.

    Args:
        path: of a file or folder.
        any_name: take a file whose name does not say its kind for tokens.
        notify: receives a line if a folder holds text beside them.
    """
    if path.is_file():
        return [path] if (kind_of(path) or ("tokens" if any_name else "text")) == "tokens" else []
    if not path.is_dir():
        return []
    found = search(path)
    if notify and found.tokens and found.texts:
        texts = [str(text.relative_to(path)) for text in found.texts]
        notify(one_line(f"{path}: left out, text beside token files: {named(texts)}"))
    return found.tokens


def find_inputs(names: Sequence[str], field: str = "text", notify: Notify | None = None) -> list[Input]:
    """All inputs that are named or lie in a folder that is named, in order.

    Args:
        names: files, folders and datasets.
        field: of datasets, which must have it.
        notify: receives a line for each kind of files that are left out or held out; by default it is logged.

    Raises:
        UserError: nothing there, nothing readable inside, or a package that is needed is not installed.
    """
    tell = notify or logging.getLogger(__name__).info

    def say(line: str) -> None:
        tell(one_line(line))

    try:
        found = [source for name in names for source in _find(name, field, say)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    if plain := [source.name for source in found if source.kind == "text" and not suffix_of(Path(source.name))]:
        say(f"read as plain text, as it stands: {named(plain)}")
    return _held_out_if_named_so(found, names, say)


def records(source: Input, field: str, start: int = 0, cut: Cut | None = None) -> Iterator[Record]:
    """The records of an input after the first `start`, read in bounded memory; `cut` says where long texts are cut.

    Raises:
        UserError: a damaged file, or one without the field.
    """
    read = {"json lines": _json_lines, "parquet": _rows, "dataset": _rows}
    if source.taken is not None:
        return
    with _reading(source):
        yield from _text(source, start, cut) if source.kind == "text" else read[source.kind](source, field, start)


def documents(source: Input, field: str) -> Iterator[tuple[int, Document | None]]:
    """The documents of an input, each as a whole, with how much of the input's size has been read after it.

    A record without text gives None.

    Raises:
        UserError: see `records` and `text_of`.
    """
    if source.kind != "text":
        for record in records(source, field):
            data = text_of(source, record, field)
            if data is None:
                yield from [(record.done, None)] * (record.missing or 1)
            else:
                yield record.done, Document(place(source, record.number), io.BytesIO(data), len(data))
        return
    path = Path(source.name)
    with _reading(source), path.open("rb") as stored, tempfile.TemporaryFile() as unpacked:
        file = stored
        if packing(path) or _begins_with_mark(path):
            file = unpacked
            unpacked.writelines(_without_mark(blocks(path, stored)))
        else:
            refuse_other_kinds(path, stored.read(1 << 16))
        yield source.size, Document(source.name, file, file.seek(0, os.SEEK_END))


def text_of(source: Input, record: Record, field: str) -> bytes | None:
    """The UTF-8 text of a record; None if it has none.

    Raises:
        BadRecord: it holds something else.
    """
    name = place(source, record.number)
    if record.missing:
        return None
    if record.fault:
        raise BadRecord(f'{name}: expected a text in "{field}", found {record.fault}')
    if source.kind == "json lines":
        return text_in_json(record.data, field, name)
    try:
        check_utf8(record.data, name)
    except UserError as error:
        raise BadRecord(str(error)) from None
    return record.data.removeprefix(BOM) if source.kind == "text" and record.number == 1 else record.data


def place(source: Input, number: int) -> str:
    """The name of a record in messages."""
    if source.kind == "text":
        return source.name if number == 1 else f"{source.name}, part {number}"
    return f"{source.name}, {'line' if source.kind == 'json lines' else 'row'} {number}"


def _begins_with_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BOM)) == BOM


def _without_mark(data: Iterator[bytes]) -> Iterator[bytes]:
    start = b""
    for block in data:  # the first may be shorter than a mark
        start += block
        if len(start) >= len(BOM):
            break
    yield start.removeprefix(BOM)
    yield from data


@contextmanager
def _reading(source: Input) -> Iterator[None]:
    """Turn what goes wrong while an input is read into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {source.name}: {error.strerror or tables.first_line(error)}") from None
    except UnicodeError as error:
        raise UserError(f"{source.name} is not UTF-8 text: {tables.first_line(error)}") from None


def _find(name: str, field: str, notify: Notify) -> list[Input]:
    path = Path(name).expanduser()
    if name.startswith(HUB) and not path.exists():
        return [_dataset_input(name, field)]
    if not path.exists():
        path = existing(name, f"text files, or {HUB}NAME[:SPLIT] for a dataset of the hub")
    if path.is_file():
        return [_file_input(path)]
    if tables.is_saved(path):
        return [_dataset_input(f"{HUB}{path}", field)]
    if (ours := what_we_wrote(path)) and ours != "token files":
        raise UserError(f"{path} is {ours} that sdd wrote, no data: name the data, or a file inside")
    found = search(path)
    if not found.texts:
        raise _nothing_in(found)
    for line in found.lines():
        notify(line)
    held_out = set(found.held_out)
    return [_file_input(file, held_out=file in held_out) for file in found.texts]


def _nothing_in(found: Folder) -> UserError:
    if found.tokens:
        return UserError(f"{found.path} holds token files, expected text: give it to sdd train --data as it is")
    there = "; ".join(line.removeprefix(f"{found.path}: ") for line in found.lines())
    return UserError(
        f"{found.path} holds no data, expected {TEXT_KINDS}, or token files, .npy or .bin, to train on"
        + (f" ({there})" if there else "")
    )


def _file_input(path: Path, held_out: bool = False) -> Input:
    kind = kind_of(path)
    if kind == "tokens":
        raise UserError(f"{path} is a token file, expected text: give it to sdd train --data as it is")
    if kind == "parquet":
        tables.pyarrow_for(str(path))
    if kind is None:
        with path.open("rb") as file:
            next(blocks(path, file), None)  # refuses what is no text
    if kind == "json lines" and is_mixture(path):
        raise UserError(f"{path} is a mixture, which sdd train --data takes: name its sources")
    status = path.stat()
    return Input(
        name=str(path), kind=kind or "text", size=status.st_size, stamp=str(status.st_mtime_ns), held_out=held_out
    )


def _held_out_if_named_so(found: list[Input], names: Sequence[str], notify: Notify) -> list[Input]:
    """Hold out files that are named for it, if they were given one by one beside one to train on."""
    parts = {name: part_of(Path(Path(name).name)) for name in names}
    held_out = {str(Path(name).expanduser()) for name, part in parts.items() if part == "validation"}
    if "train" not in parts.values() or not any(source.name in held_out for source in found):
        return found
    notify(f"held out: {named(sorted(held_out))}")
    return [source.model_copy(update={"held_out": source.held_out or source.name in held_out}) for source in found]


def _json_lines(source: Input, field: str, start: int) -> Iterator[Record]:
    path = Path(source.name)
    if not start:
        _check_json_field(source, field)
    with path.open("rb") as file:
        for number, line in enumerate(lines(path, file), start=1):
            if number > start and line.removeprefix(BOM).strip():
                yield Record(number, file.tell(), line)


def _check_json_field(source: Input, field: str) -> None:
    """Raise UserError if there are objects, and the field is in none of the first ones."""
    path = Path(source.name)
    others: dict[str, Any] = {}
    with path.open("rb") as file:
        for number, line in enumerate(lines(path, file)):
            try:
                record = parse_json(line)
            except (ValueError, RecursionError):
                continue
            if lookup(record, field) is not ABSENT:
                return
            others.update(dict.fromkeys(names_in(record)))
            if number >= _LINES_WITHOUT_FIELD:
                break
    if others:
        raise tables.no_field(source.name, field, others)


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


def _dataset_input(name: str, field: str) -> Input:
    data = tables.check_dataset_field(name, field)
    size = getattr(data, "dataset_size", None) or len(data)
    stamp = f"{len(data)} rows, {getattr(data, '_fingerprint', '')}"
    return Input(name=name, kind="dataset", size=size, stamp=stamp)


def _rows(source: Input, field: str, start: int) -> Iterator[Record]:
    """Rows as records; rows without text that follow each other are one."""
    batches = tables.parquet_batches if source.kind == "parquet" else tables.dataset_batches
    for before, total, values in batches(source.name, field, start):
        missing = 0
        for number, value in enumerate(values, start=before + 1):
            if number <= start:
                continue
            done = source.size * number // total
            missing += value is None
            if missing and (value is not None or number == before + len(values)):
                yield Record(number - (value is not None), done, b"", missing=missing)
                missing = 0
            if isinstance(value, str | bytes):
                data = value if isinstance(value, bytes) else value.encode(errors="surrogatepass")
                yield Record(number, done, data)
            elif value is not None:
                yield Record(number, done, b"", fault=kind_of_value(value))
