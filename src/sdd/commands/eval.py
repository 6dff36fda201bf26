"""`sdd eval`: a run or a transformers model on held-out text and on downstream tasks."""

import importlib
import importlib.util
import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TextColumn

from sdd.commands.parser import Parser, listed, positive_int
from sdd.errors import UserError
from sdd.evals.foreign import TransformersScorer, evaluate_transformers, is_transformers
from sdd.evals.requests import TABLE_1, Task, load_task, names
from sdd.evals.scorer import RunScorer
from sdd.evals.tasks import run_tasks
from sdd.evals.text import evaluate_run, load_trained
from sdd.terminal import SECONDS_BETWEEN_LINES, Interval, aligned, clock, progress_bar, stderr_console

_HUGGINGFACE = "sdd.interop.huggingface"  # makes the models that we export known to transformers


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_known(args)
    if options.tasks == ["list"]:
        print(*names(options.task_data), sep="\n")
        return 0
    wanted = dict.fromkeys(each for name in options.tasks or () for each in (TABLE_1 if name == "table1" else [name]))
    tasks = [load_task(name, options.task_data, options.limit) for name in wanted]
    result = _transformers(options, tasks) if is_transformers(options.run) else _run(options, tasks)
    if options.json:
        print(json.dumps(result))
        return 0
    found = result.pop("tasks", {})
    print(*(f"{name:15} {value}" for name, value in result.items()), sep="\n")
    if found:
        print(*table(found), sep="\n")
    return 0


def _run(options: Namespace, tasks: list[Task]) -> dict[str, Any]:
    trained = load_trained(options.run, options.checkpoint)
    result: dict[str, Any] = {"step": trained.step}
    if options.text or not tasks:
        with _progress("windows") as progress:
            result |= evaluate_run(trained, options.text, options.sequences, progress, options.text_field)
    if tasks:
        folder = options.out or options.run / "evals" / f"step-{trained.step:08d}"
        with _task_progress() as progress:
            result["tasks"] = run_tasks(
                RunScorer(trained), tasks, folder, batch_size=options.batch_size, progress=progress
            )
    return result


def _transformers(options: Namespace, tasks: list[Task]) -> dict[str, Any]:
    if options.checkpoint is not None:
        raise UserError(f"{options.run} is a transformers model, which has no checkpoints of steps")
    if not (options.text or tasks):
        raise UserError(f"{options.run} has no held-out data of its own: give --text FILE or --tasks LIST")
    _register_ours()
    model, result = TransformersScorer(options.run), {}
    if options.text:
        with _progress("windows") as progress:
            result |= evaluate_transformers(model, options.text, options.sequences, progress, options.text_field)
    if tasks:
        with _task_progress() as progress:
            folder = options.out or options.run / "evals"
            result["tasks"] = run_tasks(model, tasks, folder, batch_size=options.batch_size, progress=progress)
    return result


def _register_ours() -> None:
    try:
        there = importlib.util.find_spec(_HUGGINGFACE) is not None
    except ModuleNotFoundError:
        there = False
    if there:
        importlib.import_module(_HUGGINGFACE)


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The numbers of tasks as aligned lines: accuracies in percent, with their standard errors."""
    columns = {
        "acc": "acc",
        "acc_per_char": "/char",
        "acc_per_token": "/token",
        "acc_per_byte": "/byte",
        "acc_pmi": "pmi",
    }
    head = ["task", "documents", "chance", *columns.values(), "perplexity", "bits/byte"]
    rows: list[list[str]] = [head]
    for name, numbers in found.items():
        cells = [_percent(numbers, each) + "*" * (each == numbers["primary"]) for each in columns]
        chance = "-" if numbers["chance"] is None else f"{100 * numbers['chance']:.1f}"
        perplexity = f"{numbers['perplexity']:.4g}" if "perplexity" in numbers else "-"
        documents, bits = f"{numbers['documents']:,}", f"{numbers['bits_per_byte']:.3f}"
        rows.append([name, documents, chance, *cells, perplexity, bits])
    lines = aligned(rows, right=range(1, len(head)))
    lines.append("accuracies in percent, with their standard errors; * is the one that the task's authors report")
    if cut := {name: numbers["cut"] for name, numbers in found.items() if numbers["cut"]}:
        longer = ", ".join(f"{number:,} of {name}" for name, number in cut.items())
        lines.append(f"requests longer than the model's context, cut off on the left: {longer}")
    return lines


def _percent(numbers: Mapping[str, Any], name: str) -> str:
    return f"{100 * numbers[name]:.1f}±{100 * numbers[name + '_stderr']:.1f}" if name in numbers else "-"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many are done: a bar on a terminal, elsewhere a line now and then."""
    console, line = stderr_console(), Interval(SECONDS_BETWEEN_LINES)
    with progress_bar(console, TextColumn(what), MofNCompleteColumn()) as bar:
        task = bar.add_task("eval", total=None, numbers="")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and line.due():
                console.print(f"{done:,} of {total:,} {what}", markup=False)

        yield show


@contextmanager
def _task_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows the tokens done of each task, and the time left: a bar on a terminal, elsewhere a line now and then."""
    console, line = stderr_console(), Interval(SECONDS_BETWEEN_LINES)
    with progress_bar(console, TextColumn("{task.description}"), MofNCompleteColumn()) as bar:
        rows: dict[str, Any] = {}
        began: dict[str, float] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in rows:
                rows[name], began[name] = bar.add_task(name, total=total, numbers="tokens"), time.monotonic()
            bar.update(rows[name], completed=done)
            if done and not console.is_terminal and line.due():
                left = (time.monotonic() - began[name]) * (total - done) / done
                console.print(f"{name}: {done:,} of {total:,} tokens, {clock(left)} left", markup=False)

        yield show


def _parser() -> Parser:
    parser = Parser("sdd eval", "Held-out loss and downstream tasks of a run or a model.", allow_abbrev=True)
    add = parser.add_argument
    add("run", metavar="RUN|DIR", type=Path, help="run directory, or a folder of a transformers model")
    about = "held-out text: a file or folder of text, JSON lines or parquet, or hf:NAME (default: the run's own)"
    add("--text", metavar="FILE", help=about)
    add("--text-field", metavar="FIELD", default="text", help="field of the text, A.B for B inside A (default text)")
    about = "only so many windows of the text, evenly spread (default: all of it)"
    add("--sequences", metavar="N", type=positive_int, help=about)
    about = "TASK, TASK/VARIANT or a file of requests, with commas between them; table1 for the paper's; list names all"
    add("--tasks", metavar="LIST", type=listed(str), help=about)
    about = "look for TASK/VARIANT/requests.jsonl[.gz] here first; repeatable"
    add("--task-data", metavar="FOLDER", type=Path, action="append", default=[], help=about)
    add("--limit", metavar="N", type=positive_int, help="only the first N documents of each task")
    add("--batch-size", metavar="N", type=positive_int, default=16, help="requests at once (default 16)")
    add("--checkpoint", metavar="STEP|PATH", help="another than the newest whole checkpoint")
    add("--out", metavar="FOLDER", type=Path, help="of the tasks' scores (default RUN/evals/step-N or DIR/evals)")
    add("--json", action="store_true", help="print the numbers as JSON")
    return parser
