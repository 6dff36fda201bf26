"""The exceptions that `sdd` raises on purpose, and the wording that their messages share."""

import difflib
import importlib
from collections.abc import Collection
from typing import Any

#: The name under which pip installs this package; the import's is taken on the package index.
DISTRIBUTION = "sdd-torch"


class SddError(Exception):
    """The base class; its message is one line, which the command line prints without a traceback.

    Attributes:
        exit_code: with which the command line then exits.
        heading: what it prints before the message.
        rank: the process that prints, in a run of several; 0 if the error is common to all of them.
    """

    exit_code = 1
    heading = ""
    rank = 0


class UserError(SddError):
    """A mistake of the user: what was given, what was expected, what to do."""

    exit_code = 2


class MissingPackage(UserError, ImportError):
    """An optional package that is not installed."""


class RunFailed(SddError):
    """A run that cannot go on, with the reason."""

    exit_code = 3
    heading = "the run failed: "


class Diverged(RunFailed):
    """A run whose loss, gradient or weights are no longer sound: the training failed, not the machine."""


class BadData(RunFailed):
    """Training data that can no longer be read, or hold what they must not: model and optimiser are sound."""


class Interrupted(SddError):
    """A run that Ctrl-C or SIGTERM ended after saving."""

    exit_code = 130


def nearest(word: str, known: Collection[str]) -> str:
    """` (did you mean 'x'?)` with the known word most like this one, or an empty string if none is near.

    Dashes before an option do not count, and a dotted name is also known by its last part.
    """
    parts = {part: name for name in known for part in (name.rpartition(".")[2].lstrip("-"), name.lstrip("-"))}
    found = difflib.get_close_matches(word.lstrip("-"), parts, n=1, cutoff=0.7)
    return f" (did you mean {parts[found[0]]!r}?)" if found else ""


def unknown(kind: str, name: str, known: Collection[str]) -> UserError:
    """The error for a name that is not among the known ones.

    Args:
        kind: what is named, "preset" for instance.
        name: the name given.
        known: the names to choose from.
    """
    return UserError(f"no {kind} {name!r}{nearest(name, known)}; choose one of {', '.join(known)}")


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
        raise MissingPackage(f"{needed_by} needs {package}: pip install '{DISTRIBUTION}[{extra}]'") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, or the amount asked for overflowed the arithmetic of sizes."""
    known = "out of memory", "can't allocate memory", "multiplication overflow", "calculation overflow"
    return isinstance(error, MemoryError) or any(words in str(error) for words in known)


def one_line(text: object) -> str:
    """A message as one line without control characters, so that a file's name in it cannot disturb the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))
