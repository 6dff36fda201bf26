"""The text of a record: the value of a field of an object, which may lie inside other objects."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sdd.errors import UserError

ABSENT = object()
_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_ONE_A_LINE = "; jq -c . FILE, of an array jq -c '.[]' FILE, writes one object a line"


class BadRecord(UserError):
    """A record that holds something else than text; --skip-bad passes over it."""


def lookup(value: Any, field: str) -> Any:
    """The value of a field; "meta.content" is that name itself, or else content inside meta. `ABSENT` without it."""
    if not isinstance(value, Mapping):
        return ABSENT
    if field in value:
        return value[field]
    outer, dot, inner = field.partition(".")
    return lookup(value.get(outer), inner) if dot else ABSENT


def names_in(value: Any, outer: str = "") -> Iterator[str]:
    """The names under which `lookup` finds the values that are no objects."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from names_in(inner, f"{outer}{name}.") if isinstance(inner, Mapping) else (f"{outer}{name}",)


def text_in_json(line: bytes, field: str, place: str) -> bytes | None:
    """The UTF-8 text in a line of JSON; None if the field is missing or null.

    Raises:
        BadRecord: the line is no JSON object, or the field holds something else.
    """
    expected = f'{place}: expected a JSON object with a string "{field}", found '
    try:
        record = parse_json(line)
    except RecursionError:
        raise BadRecord(f"{expected}one with too many brackets inside each other") from None
    except ValueError as error:
        advice = _ONE_A_LINE if line.strip() in (b"{", b"[") else ""
        raise BadRecord(f"{expected}no JSON ({error}){advice}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"{expected}{kind_of_value(record)}{_ONE_A_LINE if isinstance(record, list) else ''}")
    value = lookup(record, field)
    if value is None or value is ABSENT:
        return None
    if not isinstance(value, str):
        raise BadRecord(f"{expected}{kind_of_value(value)} there")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{expected}half a character in it (\\u{ord(value[error.start]):x}, a lone surrogate)"
        ) from None


def parse_json(line: bytes) -> Any:
    """The value of a line of JSON; integers of more digits than Python reads become floats.

    Raises:
        ValueError, RecursionError: it holds something else.
    """
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # of an integer's length, sys.get_int_max_str_digits()
        return json.loads(line, parse_int=float)


def kind_of_value(value: Any) -> str:
    """What a value is, in words."""
    return _NAMES.get(type(value), f"a {type(value).__name__}")
