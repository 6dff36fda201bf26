"""Run configs in and out of JSON and the command line: one clear line for every mistake."""

import dataclasses
import json
import types
from collections.abc import Iterator, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sdd.errors import UserError, nearest, unknown
from sdd.files import write_aside
from sdd.placement import Placement, placements
from sdd.train.config import RunConfig

_LARGEST = 2**63 - 1  # an integer of torch
# Floats may be written as JSON cannot (a diverged run's threshold, say); unknown keys are mistakes, not extras.
_PYDANTIC = ConfigDict(extra="forbid")


def find_placement(name: str) -> Placement:
    """The placement of that name.

    Raises:
        UserError: if there is none, with the nearest name.
    """
    if name not in placements:
        raise unknown("placement", name, placements)
    return placements[name]


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dicts and lists, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names; the placement stays whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name != "model.placement":
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def from_dict(values: Mapping[str, Any], cls: type = RunConfig) -> Any:
    """Build a config from nested dicts; a placement may be given by its name.

    Raises:
        UserError: naming the field, what was given and what was expected.
    """
    try:
        config = _adapter(cls).validate_python(_resolve_placement(values))
    except ValidationError as error:
        raise UserError(_first_problem(error, cls)) from None
    except RecursionError:
        raise UserError("the config is nested too deeply to be one of ours") from None
    for dotted, _, _ in fields(cls):
        value = _value(config, dotted)
        if isinstance(value, int) and value > _LARGEST:
            raise UserError(f"{dotted}={value} is too large: at most {_LARGEST}")
    return config


def _value(config: Any, dotted: str) -> Any:
    """The value of a field; None in an optional part that is not set up."""
    return reduce(lambda part, name: getattr(part, name, None), dotted.split("."), config)


def load(path: Path) -> RunConfig:
    """Read a config.json.

    Raises:
        UserError: if it is missing, no JSON, or no valid config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, expected an object with the fields of a run")
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save(config: RunConfig, path: Path) -> None:
    """Write a config as JSON, aside and renamed; every field, so that later defaults do not change an old run."""
    write_aside(path, json.dumps(to_dict(config), indent=2) + "\n")


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """A config with some fields replaced, named with dots: `{"optim.lr": "1e-3", "steps": 200}`.

    Raises:
        UserError: for a value that does not fit its field.
    """
    values = to_dict(config)
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        target = values
        for key in path:
            if target[key] is None:  # an optional part, which this sets up
                target[key] = {}
            target = target[key]
        target[last] = value
    return from_dict(values)


def fields(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every settable field as (dotted name, type, explanation), nested dataclasses followed, placements left whole.

    An optional dataclass is set up by its fields.
    """
    hints = get_type_hints(cls)
    explained = explanations(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        inner = next((arg for arg in (hint, *get_args(hint)) if dataclasses.is_dataclass(arg)), Placement)
        if inner is not Placement:
            yield from fields(inner, f"{prefix}{item.name}.")  # pyright: ignore[reportArgumentType]
        else:
            yield prefix + item.name, hint, explained.get(item.name, "")


def explanations(cls: type) -> dict[str, str]:
    """What the `Attributes:` section of a dataclass's docstring says of each field."""
    found: dict[str, str] = {}
    name = ""
    _, _, section = (cls.__doc__ or "").partition("Attributes:\n")
    for line in section.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not text:
            break
        if indent == 8 and ":" in text:
            name, _, text = text.partition(":")
        found[name] = f"{found.get(name, '')} {text.strip()}".strip()
    return found


def describe_type(hint: Any) -> str:
    """How a field's type is named to users: `int`, `float`, `cosine|wsd|constant`, `text or none`."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(describe_type(arg) for arg in get_args(hint))
    if hint is types.NoneType:
        return "none"
    if hint is bool:
        return "true|false"
    if hint is Placement:
        return "name"
    return {str: "text"}.get(hint, getattr(hint, "__name__", str(hint)))


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    for owner in _dataclasses_in(cls):
        owner.__pydantic_config__ = _PYDANTIC  # type: ignore[attr-defined]
    return TypeAdapter(cls)


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    """A type and every dataclass among its fields' types."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
        for inner in get_type_hints(hint).values():
            yield from _dataclasses_in(inner)
    for inner in get_args(hint):
        yield from _dataclasses_in(inner)


def _resolve_placement(values: Mapping[str, Any]) -> dict[str, Any]:
    model = values.get("model")
    if isinstance(model, Mapping) and isinstance(name := model.get("placement"), str):
        values = {**values, "model": {**model, "placement": to_dict(find_placement(name))}}
    return dict(values)


def _first_problem(error: ValidationError, cls: type) -> str:
    """The first problem of a failed validation, in one line."""
    problem = error.errors(include_url=False)[0]
    location = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {location!r}{nearest(location, [name for name, _, _ in fields(cls)])}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"the field {location!r} is missing"
    if problem["type"] == "value_error":
        return f"{location}: {message}" if location else message
    return f"{location}={problem['input']!r}: {message[:1].lower()}{message[1:]}"
