"""What the commands share: their parser, and the run that a preset's name stands for."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sdd.errors import UserError
from sdd.models import as_printed, model_presets
from sdd.train import RunConfig, config_io, preset


class Parser(argparse.ArgumentParser):
    """argparse with one clear line for a mistake, and the nearest right name."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError in place of argparse's usage and exit."""
        raise UserError(message)

    def parse_known(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse; `--optim.weight-decay` is taken for `--optim.weight_decay` too."""
        namespace, unknown = self.parse_known_args([self._known_spelling(word) for word in args])
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            word = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {word}{config_io.nearest(word, options)}; see {self.prog} --help")
        return namespace

    def _known_spelling(self, word: str) -> str:
        name, equals, value = word.partition("=")
        other = "--" + name[2:].replace("-", "_")
        known = self._option_string_actions
        return other + equals + value if name.startswith("--") and name not in known and other in known else word


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def port_number(text: str) -> int:
    """An argparse type: a TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def base_config(name: str, printed: bool = False) -> RunConfig:
    """The run that a preset's name or the path of a config.json stands for.

    Args:
        name: the preset or path.
        printed: a published shape exactly as its table prints it, see `sdd.models.as_printed`.

    Raises:
        UserError: if there is none, or the preset is not a published shape but should be.
    """
    if Path(name).suffix == ".json":
        return config_io.load(Path(name))
    if name not in model_presets:
        near = config_io.nearest(name, list(model_presets))
        raise UserError(f"no preset {name!r}{near}; choose one of {', '.join(model_presets)}")
    if not printed:
        return preset(name)
    try:
        return replace(preset(name), model=as_printed(name))
    except KeyError:
        raise UserError(f"--printed-shape is for the published shapes, {name} is not one") from None
