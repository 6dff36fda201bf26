"""Studies by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sdd.errors import UserError
from sdd.lab import demo


@dataclass(frozen=True)
class Study:
    """A question, and what answers it: a grid of runs, a table, figures and a page.

    Attributes:
        about: the question in one line.
        run: (out, seeds, workers) to the command's exit code.
    """

    about: str
    run: Callable[[Path, int, int | None], int]


#: The studies by name.
studies: Mapping[str, Study] = MappingProxyType({"demo": Study(demo.QUESTION, demo.run)})


def run_study(name: str, out: Path, seeds: int = 1, workers: int | None = None) -> int:
    """Run a study, or finish one that was interrupted, and write its page.

    Args:
        name: one of `studies`.
        out: folder of its runs, figures and page.
        seeds: seeds a setting.
        workers: runs at once; by default one a core, at most four.

    Returns:
        The exit code, 0.

    Raises:
        KeyError: if there is no such study.
        Interrupted: after Ctrl-C or SIGTERM, with every run saved.
        RunFailed: if a run ended for another reason than a non-finite loss.
        UserError: if `out` cannot be written or holds runs with other settings.
    """
    try:
        return studies[name].run(out, seeds, workers)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from None
