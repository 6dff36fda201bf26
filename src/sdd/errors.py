"""The exceptions that `sdd` raises on purpose."""

import importlib
from typing import Any


class SddError(Exception):
    """Any of them.

    Attributes:
        rank: which process of a run of several tells it: the first, if all of them meet it.
    """

    rank = 0


class UserError(SddError):
    """A mistake of the user, told in one line: what was given, what was expected, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class MissingPackage(UserError, ImportError):
    """An optional package that is not installed."""


class RunFailed(SddError):
    """A run that cannot go on, told in one line; the command line exits with code 3."""


class Diverged(RunFailed):
    """A run whose loss, gradient or weights are no sound numbers any more: what was trained failed, not the machine."""


class Interrupted(SddError):
    """A run that Ctrl-C or SIGTERM ended after saving; the command line exits with code 130."""


def require_extra(extra: str, *modules: str, needed_by: str) -> list[Any]:
    """Import optional packages and return their modules, in order.

    Args:
        extra: the extra of `sdd` that installs them.
        modules: their full names.
        needed_by: the subject of the message, e.g. "x.parquet".

    Raises:
        MissingPackage: if one is not installed; the message names it and the command that installs the extra.
    """
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingPackage(f"{needed_by} needs {package}: pip install 'sdd[{extra}]'") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, or so much was asked for that its amount is no number any more."""
    known = "out of memory", "can't allocate memory", "multiplication overflow", "calculation overflow"
    return isinstance(error, MemoryError) or any(words in str(error) for words in known)


def one_line(text: object) -> str:
    """A message as one line that cannot do anything to a terminal, whatever names of files it repeats."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))
