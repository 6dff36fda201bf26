"""The command `sdd tokenize`."""

import json
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from sdd.commands.parser import Parser, positive_int
from sdd.data import Tokenizer, TokenizeSettings, builtin_tokenizer, tokenize
from sdd.data.tokenize_job import VALIDATION_FRACTION, Status
from sdd.data.workers import available_cpus
from sdd.errors import Interrupted, UserError, one_line
from sdd.models import model_presets
from sdd.terminal import SECONDS_BETWEEN_LINES, Interval, clock, counted, progress_bar, stderr_console

_ABOUT = """Turn text into token files, a folder that `--data DIR` takes.

INPUT is text (.txt, .md), JSON lines (.jsonl, .ndjson, .json), each also packed (.gz, .zst, .bz2, .xz), parquet (extra
`data`), a folder of these, or a Hugging Face dataset (extra `datasets`): hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT,
or a folder that save_to_disk wrote. If it is interrupted or killed, the same command goes on where it was."""


def main(args: list[str]) -> int:
    """Run `sdd tokenize`; returns its exit code."""
    options = _parser().parse_known(args)
    settings, display, before = _settings(options), Display(), _raise_on_sigterm()
    try:
        with display.bar:
            result = tokenize(options.inputs, options.out, settings, display.show, display.say)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the same command goes on where it was, into {options.out}") from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if 0 < result["validation_tokens"] <= (least := min(model.context for model in model_presets.values())):
        display.say(
            f"{counted(result['validation_tokens'], 'token')} held out: a run needs more than its context, which is at "
            f"least {least} in the presets; a larger --validation-fraction holds out more"
        )
    print(json.dumps(result) if options.json else _in_words(result))
    return 0


class Display:
    """Progress on stderr: a bar on a terminal, elsewhere a line now and then.

    Attributes:
        bar: the bar, to be entered during the work.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr_console()
        self.bar = progress_bar(self.console, TextColumn("{task.percentage:.0f}%"))
        self._task = self.bar.add_task("tokenize", total=None, numbers="")
        self._line = Interval(SECONDS_BETWEEN_LINES)
        self._first: int | None = None

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(one_line(line), markup=False)

    def show(self, status: Status) -> None:
        """Show how far the work has come."""
        rate = status.text_bytes / 1e6 / max(status.seconds, 1e-9)
        numbers = f"{status.total.n_tokens:,} tokens   {rate:.1f} MB/s of text"
        done = f"{status.done / max(status.size, 1):.0%}"
        if self._first is None:
            self._first = status.done
            if status.done:
                self.console.print(f"going on at {done}", markup=False)
            self.bar.reset(self._task, total=status.size, completed=status.done, numbers=numbers)
        elif not self.console.is_terminal and self._line.due():
            left = status.seconds * (status.size - status.done) / max(status.done - self._first, 1)
            self.console.print(f"{done}   {numbers}   {clock(left)} left", markup=False)
        self.bar.update(self._task, completed=status.done, numbers=numbers)


def _parser() -> Parser:
    parser = Parser(prog="sdd tokenize", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="file, folder or hf:NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the token files")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json (default: the built-in one)")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="processes (default: one a core)")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=VALIDATION_FRACTION,
        metavar="X",
        help=f"share of the text to hold out, from the ends of documents (default {VALIDATION_FRACTION})",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of the text, A.B for B inside A (default text)",
    )
    parser.add_argument("--dtype", default="auto", metavar="auto|uint16|uint32", help="of the tokens (default auto)")
    parser.add_argument("--eos", metavar="TOKEN", help="token after each document (default: the tokenizer's own)")
    parser.add_argument("--skip-bad", action="store_true", help="pass over records that are no text, naming the first")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _settings(options: Namespace) -> TokenizeSettings:
    if options.dtype not in ("auto", "uint16", "uint32"):
        raise UserError(f"--dtype {options.dtype}: choose auto, uint16 or uint32")
    same = {name: getattr(options, name) for name in ("validation_fraction", "text_field", "dtype", "eos", "skip_bad")}
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else builtin_tokenizer()
    return TokenizeSettings(tokenizer, options.workers or available_cpus(), **same)


def _raise_on_sigterm() -> Any:
    """Let SIGTERM end the work as Ctrl-C does.

    Returns:
        The handler before; None outside the main thread, where signals belong to others.
    """
    try:
        return signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:
        return None


def _in_words(result: dict[str, Any]) -> str:
    speed = f", {result['mb_per_second']:.1f} MB/s" if result["mb_per_second"] else ""
    skipped = f", {counted(result['skipped'], 'record')} skipped" if result["skipped"] else ""
    if result["without_text"]:
        skipped += f", {counted(result['without_text'], 'record')} without text"
    lost = f", {counted(result['lost_bytes'], 'byte')} without a token left out" if result["lost_bytes"] else ""
    return (
        f"done: {counted(result['tokens'], 'token')} of {counted(result['documents'], 'document')}, "
        f"{result['validation_tokens']:,} held out "
        f"({result['text_bytes'] / 1e6:,.1f} MB of text{speed}{skipped}{lost}); use them with: --data {result['out']}"
    )
