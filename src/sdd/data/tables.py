"""The columns of parquet files and of Hugging Face datasets, as batches of rows."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdd.data.fields import ABSENT, lookup
from sdd.data.spec import HUB
from sdd.errors import UserError, require_extra

_ROWS = 256


def pyarrow_for(name: str) -> Any:
    """The modules pyarrow.parquet and pyarrow.

    Raises:
        MissingPackage: it is not installed.
    """
    return require_extra("data", "pyarrow.parquet", "pyarrow", needed_by=f"{name} is parquet, which")


def parquet_batches(name: str, field: str, start: int) -> Iterator[tuple[int, int, list[Any]]]:
    """The values of a column, from the row group on that holds row `start`.

    Yields:
        How many rows precede, how many there are in all, and some values.

    Raises:
        UserError: a damaged file, or one without that column.
    """
    parquet, arrow = pyarrow_for(name)
    try:
        with parquet.ParquetFile(name) as file:
            path = _path_to(field, file.schema_arrow, arrow)
            if not path:
                raise no_field(name, field, _paths(file.schema_arrow, arrow))
            total, number = file.metadata.num_rows, 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= start:
                    number += rows
                    continue
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[".".join(path)]):
                    values = _bytes(_inner(batch, path), arrow).to_pylist()
                    yield number, total, values
                    number += len(values)
    except arrow.ArrowException as error:
        raise UserError(f"{name} is damaged or no parquet file: {first_line(error)}") from None


def _path_to(field: str, inside: Any, arrow: Any) -> tuple[str, ...]:
    """The names from a schema or struct type down to a field; empty without it."""
    there = {column.name: column.type for column in inside}
    if field in there:
        return (field,)
    outer, _, inner = field.partition(".")
    if inner and outer in there and arrow.types.is_struct(there[outer]):
        rest = _path_to(inner, _members(there[outer]), arrow)
        return (outer, *rest) if rest else ()
    return ()


def _members(struct: Any) -> list[Any]:
    return [struct.field(number) for number in range(struct.num_fields)]


def _paths(inside: Any, arrow: Any, prefix: str = "") -> list[str]:
    """The names of all columns, those inside others with a dot."""
    found = []
    for column in inside:
        name = prefix + column.name
        is_struct = arrow.types.is_struct(column.type)
        found += _paths(_members(column.type), arrow, f"{name}.") if is_struct else [name]
    return found


def _inner(batch: Any, path: Sequence[str]) -> Any:
    column = batch.column(batch.schema.get_field_index(path[0]))
    if len(path) == 1:
        return column
    (compute,) = require_extra("data", "pyarrow.compute", needed_by="parquet")
    return compute.struct_field(column, list(path[1:]))


def _bytes(column: Any, arrow: Any) -> Any:
    """A column of strings as one of bytes, so that bytes that are not UTF-8 are reported as for any other input."""
    is_text = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
    return column.cast(arrow.large_binary()) if is_text else column


def dataset_batches(name: str, field: str, start: int) -> Iterator[tuple[int, int, list[Any]]]:
    """The values of a dataset's column after the first `start`, as `parquet_batches`."""
    data = load_dataset(name)
    column = _column_of(field, data.column_names)
    data = data.select_columns([column])
    for first in range(start, len(data), _ROWS):
        values = data[first : first + _ROWS][column]
        if column != field:
            found = [lookup({column: value}, field) for value in values]
            values = [None if value is ABSENT else value for value in found]
        yield first, len(data), values


def check_dataset_field(name: str, field: str) -> Any:
    """The dataset of a name, which must have the column.

    Raises:
        UserError: it cannot be loaded, or has no such column.
    """
    data = load_dataset(name)
    features = getattr(data, "features", None)
    nested = _column_of(field, data.column_names)
    if not nested or (isinstance(features, dict) and lookup(features, field) is ABSENT):
        raise no_field(name, field, data.column_names)
    return data


def _column_of(field: str, columns: Sequence[str]) -> str:
    """The column that holds a field: itself, or one that the field lies in; empty if there is none."""
    parts = field.split(".")
    return next((name for n in (len(parts), *range(1, len(parts))) if (name := ".".join(parts[:n])) in columns), "")


def no_field(name: str, field: str, there: Iterable[str]) -> UserError:
    """The error for an input without a field of that name, with those that it has."""
    close = difflib.get_close_matches(field, list(there), n=1, cutoff=0.5) or list(there)
    return UserError(
        f"{name} has no field {field!r}: choose with sdd tokenize --text-field, e.g. {', '.join(close[:8])}"
    )


@lru_cache(maxsize=4)
def load_dataset(name: str) -> Any:
    """The dataset of hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; NAME may be a folder that save_to_disk wrote.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    (datasets,) = require_extra("datasets", "datasets", needed_by=name)
    location, *others = re.split(r":(?![^[]*\])", name.removeprefix(HUB))  # not at the colon of train[:10%]
    split = others.pop() if others else "train"
    try:
        if not is_saved(Path(location)):
            return datasets.load_dataset(location, *others[:1], split=split)
        data = datasets.load_from_disk(location)
    except Exception as error:  # of the hub, the network, the disk: the library has no common base for them
        raise UserError(f"cannot load the dataset {name}: {first_line(error)}") from None
    if not hasattr(data, "keys"):
        return data
    if split not in data:
        raise UserError(f"{name} has the splits {', '.join(data)}: name one, {HUB}{location}:SPLIT")
    return data[split]


def is_saved(path: Path) -> bool:
    """Whether save_to_disk wrote this folder; a checkpoint of ours has a state.json too."""
    if (path / "dataset_dict.json").is_file():
        return True
    return (path / "state.json").is_file() and not any(path.glob("*.safetensors"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
