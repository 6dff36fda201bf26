"""The parser of every command and the types of its options; imports no torch, so that `sdd --help` answers at once."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from sdd.errors import UserError, nearest, unknown


class Parser(argparse.ArgumentParser):
    """argparse with one clear line for a mistake, and the nearest right name.

    Args:
        prog: the command, `sdd probe` for instance.
        description: what it does.
        usage: what may stand behind it; by default argparse writes it.
        allow_abbrev: whether options may be shortened.
    """

    def __init__(self, prog: str, description: str, usage: str | None = None, *, allow_abbrev: bool = False) -> None:
        usage = usage and f"{prog} {usage}"
        super().__init__(prog=prog, description=description, usage=usage, allow_abbrev=allow_abbrev)

    def error(self, message: str) -> NoReturn:
        """Raise UserError, where argparse would print its usage and exit."""
        raise UserError(message)

    def parse_known(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of the command.

        Raises:
            UserError: for an argument that the command does not have, or a value that does not fit.
        """
        namespace, unknown_words = self.parse_known_args([self._known_spelling(word) for word in args])
        if unknown_words:
            options = [option for action in self._actions for option in action.option_strings]
            word = unknown_words[0].split("=")[0]
            raise UserError(f"unknown argument {word}{nearest(word, options)}; see {self.prog} --help")
        return namespace

    def _known_spelling(self, word: str) -> str:
        """Turn `--optim.weight-decay` into the known `--optim.weight_decay`."""
        name, equals, value = word.partition("=")
        other = "--" + name[2:].replace("-", "_")
        known = self._option_string_actions
        return other + equals + value if name.startswith("--") and name not in known and other in known else word


def choose(program: str, kind: str, abouts: Mapping[str, str], args: Sequence[str]) -> str | None:
    """The command that the first argument names.

    Args:
        program: what stands before its name on the command line.
        kind: what is chosen, "command" for instance.
        abouts: a line of help for each name.
        args: the command line after `program`.

    Returns:
        The name; None after the list of all names was printed, because it was asked for or no name was given.

    Raises:
        UserError: if there is none of that name.
    """
    if args and args[0] not in ("-h", "--help"):
        if args[0] not in abouts:
            raise unknown(kind, args[0], abouts)
        return args[0]
    width = max(map(len, abouts))
    lines = [f"  {name:{width}}  {about}" for name, about in abouts.items()]
    print(f"usage: {program} {kind.upper()} ...   ({program} {kind.upper()} --help explains)\n", *lines, sep="\n")
    return None


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most:,}"

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return int(text)

    return convert


positive_int = whole_number(1)


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """An argparse type: one of these words."""

    def convert(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}{nearest(text, known)}")
        return text

    return convert


def listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values with commas between them."""
    return lambda text: [one(word) for word in text.split(",")]
