"""A run's config on the command line: a preset, and an option for each field."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdd.errors import UserError, unknown
from sdd.models import as_printed, model_presets
from sdd.train import RunConfig, config_io, preset

#: Fields with a short name; each field also has its dotted name.
SHORT = {
    "model.placement": "placement",
    "model.init_scale": "init-scale",
    "optim.lr": "lr",
    "optim.warmup": "warmup",
    "data.path": "data",
}


def add_preset(parser: argparse.ArgumentParser) -> None:
    """Let a command take a preset, or a published shape as it was printed."""
    parser.add_argument("preset", metavar="PRESET", help=", ".join(model_presets) + "; or the path of a config.json")
    parser.add_argument("--printed-shape", action="store_true", help="581m to 2b: 8 kv heads and 100,278 tokens")


def add_fields(
    parser: argparse.ArgumentParser,
    names: Mapping[str, str] = SHORT,
    *,
    dotted_names: bool = True,
    only: str | tuple[str, ...] = "",
) -> None:
    """Add an option for each field of a config; `overrides` reads them.

    Args:
        parser: gets the options.
        names: short names of fields.
        dotted_names: offer every field by its dotted name; without, only the fields of `names`.
        only: offer only the fields whose dotted name begins so, or in one of these ways.
    """
    for dotted, hint, about in config_io.fields():
        if not dotted.startswith(only):
            continue
        flags = [f"--{names[dotted]}"] if dotted in names else []
        flags += [f"--{dotted}"] if dotted_names else []
        if flags:
            kind = config_io.describe_type(hint)
            parser.add_argument(*flags, dest=dotted, metavar=kind, help=about.replace("%", "%%"))


def overrides(options: argparse.Namespace, only: str | tuple[str, ...] = "") -> dict[str, Any]:
    """The fields that were given, by dotted name; text, which is checked when it becomes part of a config.

    Args:
        options: what was parsed.
        only: what `add_fields` was given: a command's own option may have the name of a field that it does not offer.
    """
    given = {dotted: getattr(options, dotted, None) for dotted, _, _ in config_io.fields() if dotted.startswith(only)}
    return {dotted: None if text.lower() == "none" else text for dotted, text in given.items() if text is not None}


def base_config(name: str, printed: bool = False) -> RunConfig:
    """The run that a preset's name or the path of a config.json stands for.

    Args:
        name: the preset or path.
        printed: take a published shape exactly as its table prints it, see `sdd.models.as_printed`.

    Raises:
        UserError: if there is none, or `printed` is asked of a preset that is no published shape.
    """
    if Path(name).suffix == ".json":
        return config_io.load(Path(name))
    if name not in model_presets:
        raise unknown("preset", name, model_presets)
    if not printed:
        return preset(name)
    try:
        return replace(preset(name), model=as_printed(name))
    except KeyError:
        raise UserError(f"--printed-shape is for the published shapes, {name} is not one") from None


def with_placement(config: RunConfig, name: str) -> RunConfig:
    """The same run with the placement of that name.

    Raises:
        UserError: if there is none, or if it does not fit the run.
    """
    return config_io.with_overrides(config, {"model.placement": name})
