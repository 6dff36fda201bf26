"""Run configs to and from JSON and the command line. Every mistake is reported in one clear line."""

import dataclasses
import json
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sdd.errors import UserError, nearest, unknown
from sdd.files import write_aside
from sdd.models import ModelConfig
from sdd.placement import Placement, current_fields, placements
from sdd.train.config import RunConfig

_SHOWN = 80  # characters of a wrong value in a message
_LARGEST = 2**63 - 1  # the largest integer that torch can hold


def find_placement(name: str) -> Placement:
    """The placement with this name.

    Raises:
        UserError: if there is none; the message names the nearest.
    """
    if name not in placements:
        raise unknown("placement", name, placements)
    return placements[name]


def with_placement(model: ModelConfig, name: str) -> ModelConfig:
    """The same model with the placement of that name.

    Raises:
        UserError: if there is none, or if it does not fit the model.
    """
    try:
        return dataclasses.replace(model, placement=find_placement(name))
    except ValueError as error:
        raise UserError(str(error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dicts and lists, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted names; the placement stays whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name != "model.placement":
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a config from nested dicts; a placement may be given by its name.

    Raises:
        UserError: naming the field, what was given and what was expected.
    """
    try:
        config = _adapter().validate_python(_resolve_placement(values))
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None
    except RecursionError:
        raise UserError("the config is nested too deeply to be the config of a run") from None
    for dotted, value in flatten(dataclasses.asdict(config)).items():
        if isinstance(value, int) and value > _LARGEST:
            raise UserError(f"{dotted}={value} is too large: at most {_LARGEST}")
    return config


def load(path: Path) -> RunConfig:
    """Read a config.json.

    Raises:
        UserError: if it is missing, not JSON, or not a valid config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise UserError(f"expected a JSON object with the fields of a run, found a {type(values).__name__}")
        check_of_run(values)
        return from_dict(values)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error).splitlines()[0]}") from None


def check_of_run(values: Mapping[str, Any]) -> None:
    """Refuse the config.json of a folder of transformers, which has the place and the name of a run's.

    Raises:
        UserError: if it is one.
    """
    if "model_type" in values and "model" not in values:
        raise UserError("a model of transformers, not a run: sdd import DIR --out RUN makes a run of it")


def save(config: RunConfig, path: Path) -> None:
    """Write every field of a config as JSON, so that later defaults do not change an old run."""
    write_aside(path, json.dumps(to_dict(config), indent=2) + "\n")


def with_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """A config with some fields replaced. Fields are named with dots: `{"optim.lr": "1e-3", "steps": 200}`.

    Raises:
        UserError: for a value that does not fit its field.
    """
    values = to_dict(config)
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        target = values
        for key in path:
            target[key] = target[key] or {}  # an optional part is set up by its fields
            target = target[key]
        target[last] = value
    return from_dict(values)


def fields(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every settable field as (dotted name, type, explanation).

    Nested dataclasses give their own fields, optional ones too; a placement is a single field.
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
    """The text on each field in the `Attributes:` section of a dataclass's docstring."""
    section = (cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {8}([\w, ]+):(.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def describe_type(hint: Any) -> str:
    """A field's type in the words of the help: `int`, `float`, `cosine|wsd|constant`, `text or none`."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(describe_type(arg) for arg in get_args(hint))
    words = {types.NoneType: "none", bool: "true|false", Placement: "name", str: "text"}
    return words.get(hint) or getattr(hint, "__name__", str(hint))


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    for owner in _dataclasses_in(RunConfig):
        owner.__pydantic_config__ = ConfigDict(extra="forbid")  # an unknown key is a mistake
    return TypeAdapter(RunConfig)


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    """A type and every dataclass among its fields' types."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
        for inner in get_type_hints(hint).values():
            yield from _dataclasses_in(inner)
    for inner in get_args(hint):
        yield from _dataclasses_in(inner)


def _resolve_placement(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the placement in full, where its name or an earlier version's fields were given."""
    model = values.get("model")
    if not isinstance(model, Mapping):
        return dict(values)
    placement = model.get("placement")
    if isinstance(placement, str):
        model = {**model, "placement": to_dict(find_placement(placement))}
    elif isinstance(placement, Mapping):
        model = {**model, "placement": current_fields(placement)}
    return {**values, "model": model}


def with_current_placement(values: dict[str, Any]) -> dict[str, Any]:
    """A stored config whose placement has every field of today, as an earlier version's lacks some.

    A placement that is not valid stays as it is.
    """
    values = _resolve_placement(values)
    if not isinstance(values.get("model"), Mapping):
        return values
    try:
        placement = TypeAdapter(Placement).validate_python(values["model"].get("placement"))
    except ValidationError:
        return values
    return {**values, "model": {**values["model"], "placement": to_dict(placement)}}


def _first_problem(error: ValidationError) -> str:
    """The first problem of a failed validation, in one line."""
    problem = error.errors(include_url=False)[0]
    location = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    known = {name: (hint, about) for name, hint, about in fields()}
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {location!r}{nearest(location, known)}"
    if problem["type"] in ("missing", "missing_argument"):
        about = f": {known[location][1]}" if location in known else ""
        return f"the field {location!r} is missing{about.rstrip('.')}"
    if problem["type"] == "value_error":
        return f"{location}: {message}" if location else message
    given = repr(problem["input"])
    given = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
    # the members of a union stand behind the field's own name
    field = next((name for name in known if f"{location}.".startswith(f"{name}.") and name != "model.placement"), None)
    if field is not None:
        hint = known[field][0]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        near = nearest(problem["input"], choices) if isinstance(problem["input"], str) else ""
        return f"{field}={given} must be {_expected(hint)}{near}"
    if problem["type"] in ("dataclass_type", "dict_type"):
        return f"{location or 'the config'}={given} must be an object with fields"
    return f"{location}={given}: {message.replace('Input should be', 'must be')}"


def _expected(hint: Any) -> str:
    """The values of a field's type, in a message."""
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(_expected(arg) for arg in get_args(hint))
    words = {types.NoneType: "none", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, "an object with fields")
