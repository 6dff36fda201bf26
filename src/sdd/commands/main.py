"""The `sdd` command: it runs the command that its first argument names, and turns errors into exit codes.

A command is the function `main` of the module of the same name beside this one. They are imported only when they run,
so that `sdd --help` and `sdd --version` answer without torch.
"""

import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module

from sdd import __version__
from sdd.commands.parser import choose
from sdd.errors import SddError, is_out_of_memory, one_line

#: The commands, and a line of help for each.
COMMANDS = {
    "train": "train a preset",
    "resume": "go on with an interrupted run",
    "convert": "go on with a run with SDD at some of its projections, calibrated",
    "report": "a page with curves, settings and samples of one or more runs",
    "generate": "continue a text with a trained run",
    "eval": "held-out loss and bits per byte of a run",
    "probe": "statistics of a checkpoint's activations, gradients and weights on given data",
    "plan": "memory, time and GPU-hours of a preset on given GPUs, before anything is run",
    "bench": "time of fused operations and of training steps on this machine",
    "presets": "list the presets and placements, or show one",
    "study": "run a study and write its page",
    "export": "write a run as a folder that transformers loads",
    "import": "take a model of transformers into a run",
    "tokenize": "turn text, JSON lines, parquet or a dataset into token files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 the user's mistake, 3 the run failed, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    if not args or args[0] not in COMMANDS:
        return _exit_code(args)
    from sdd.train.ending import supervised
    from sdd.train.parallel import speaks

    logging.basicConfig(level=logging.WARNING if speaks() else logging.ERROR, format="%(message)s")
    logging.getLogger("sdd").setLevel(logging.INFO if speaks() else logging.ERROR)  # other packages only warn
    return supervised(partial(_exit_code, args))


def _run(args: list[str]) -> int:
    if args[:1] == ["--version"]:
        print(__version__)
        return 0
    name = choose("sdd", "command", COMMANDS, args)
    if name is None:
        return 0 if args else 2
    return import_module(f"sdd.commands.{name}").main(args[1:])


def _exit_code(args: list[str]) -> int:
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except SddError as error:
        _tell(f"sdd: {error.heading}{one_line(error)}", error.rank)
        return error.exit_code
    except KeyboardInterrupt:
        _tell("sdd: interrupted")
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(next(iter(str(error).splitlines()), ""))[:200]
        return _failed(f"not enough memory ({reason}): lower data.batch_size, raise accumulate, or shrink the model")
    except OSError as error:
        _drop_stdout()
        where = f"{error.filename}: " if error.filename else ""
        return _failed(one_line(f"{where}{error.strerror or error}"))


def _failed(line: str) -> int:
    """Report the failure from the process that meets it, since the others of its job may not meet it."""
    _tell(f"sdd: failed: {line}", int(os.environ.get("RANK", 0)))
    return 3


def _tell(line: str, rank: int = 0) -> None:
    """Print a last line on stderr; of a job's processes, only that of this rank does."""
    if "RANK" in os.environ:
        from sdd.train.parallel import tell

        tell(line, rank)
        return
    with suppress(OSError):  # nobody listens any more
        print(line, file=sys.stderr, flush=True)


def _drop_stdout() -> None:
    """Discard what could not be printed: tried again at exit, it would end in a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
