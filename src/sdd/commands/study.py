"""`sdd study`: studies by name, and how one is run."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sdd.commands.configs import add_fields, overrides
from sdd.commands.parser import Parser, positive_int
from sdd.errors import UserError, unknown
from sdd.lab.definition import Definition, PlannedStudy, Request, own_fields
from sdd.lab.engine import Engine, read_request, write_request
from sdd.lab.findings import Findings
from sdd.lab.grid.claims import Claims
from sdd.lab.studies import studies
from sdd.report import require_report_extra
from sdd.terminal import stderr_console
from sdd.train.parallel import pick_autocast, pick_device


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "sdd study",
        "Run a study: a grid of runs, tables, figures and a page. Options default to those that --out has.",
        "NAME [--preset P] [--seeds N] [--workers W] [--out DIR] [OPTIONS]",
    )
    about = "; ".join(f"{name}: {study.question}" for name, study in studies.items())
    parser.add_argument("name", metavar="NAME", help=about)
    parser.add_argument("--out", type=Path, help="folder of its runs, results and page (default: studies/NAME)")
    parser.add_argument("--preset", help="model and length of the runs (default nano)")
    parser.add_argument("--seeds", type=positive_int, help="seeds a setting (default 3, of the demo 1)")
    about = "runs at once (default: one a GPU, or a core, at most four)"
    parser.add_argument("--workers", type=positive_int, help=about)
    about = "train up to N runs of one shape in one process, as one computation (default 1; a GPU bears dozens)"
    parser.add_argument("--stack", metavar="N", type=positive_int, default=1, help=about)
    parser.add_argument("--placements", metavar="A,B", default="", help="methods to compare (default: the study's)")
    about = "settings to compare them under, of a study that has several (default: all)"
    parser.add_argument("--conditions", metavar="A,B", default="", help=about)
    about = "tokens of a run, for a study by length, such as 0.3M,1M,3M (default: the study's)"
    parser.add_argument("--lengths", metavar="N,N", type=_lengths, default=(), help=about)
    about = "numbers of blocks, for a study by depth, such as 12,64 (default: the study's)"
    parser.add_argument("--depths", metavar="N,N", type=_depths, default=(), help=about)
    parser.add_argument("--tuned", action="store_true", help="robustness: tune the learning rate of every cell")
    add_fields(parser)
    options = parser.parse_known(args)
    if options.name not in studies:
        raise unknown("study", options.name, studies)
    asked = Options(
        seeds=options.seeds,
        workers=options.workers,
        stack=options.stack,
        preset=options.preset,
        placements=tuple(filter(None, options.placements.split(","))),
        conditions=tuple(filter(None, options.conditions.split(","))),
        tuned=options.tuned,
        lengths=options.lengths,
        depths=options.depths,
        overrides=overrides(options),
    )
    return run_study(options.name, options.out or Path("studies") / options.name, asked)


@dataclass(frozen=True)
class Options:
    """The options that were given; None and empty where they were not.

    Attributes:
        seeds: number of reported seeds.
        workers: runs at once on this machine.
        stack: the most runs that one process trains together.
        preset: of the model and its run.
        placements: the methods to compare.
        conditions: the settings to compare them under.
        tuned: tune the learning rate of every cell.
        lengths: tokens of a run, for a study by length.
        depths: numbers of blocks, for a study by depth.
        overrides: fields of the run, by dotted name.
    """

    seeds: int | None = None
    workers: int | None = None
    stack: int = 1
    preset: str | None = None
    placements: Sequence[str] = ()
    conditions: Sequence[str] = ()
    tuned: bool = False
    lengths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)


def run_study(name: str, out: Path, options: Options | None = None) -> int:
    """Run a study, or finish one that was interrupted, and write its page.

    Args:
        name: one of `studies`.
        out: folder of its runs, results, figures and page.
        options: the others come from the folder's study.json, or else from the study's defaults.

    Returns:
        The exit code, 0.

    Raises:
        KeyError: if there is no such study.
        Interrupted: after Ctrl-C or SIGTERM, with every run saved.
        RunFailed: if a run ended for another reason than divergence.
        UserError: if `out` cannot be written or holds runs with other settings, or an option does not fit the study.
    """
    try:
        return _run(studies[name], out, options or Options())
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from None


def _run(definition: Definition, out: Path, options: Options) -> int:
    require_report_extra()  # before hours of work, not after
    from sdd.lab.page import write_study

    plan = PlannedStudy(definition, _request(definition, out, options))
    console = stderr_console()
    write_request(plan)
    outcome = Engine(plan, console).outcome()
    findings = definition.read(outcome)
    _print_answer(findings, console)
    claims = Claims(out / "claims")
    if claims.take("report"):
        page = write_study(outcome, findings)
        claims.release("report")
        console.print(f"\nThe page: {page}", markup=False)
    else:
        console.print("\nThe page is being written by another machine.", markup=False)
    return 0


def _request(definition: Definition, out: Path, options: Options) -> Request:
    """Combine the given options with those of the folder and with the study's defaults, in this order."""
    stored = read_request(out)
    if stored and stored.get("study") != definition.name:
        raise UserError(f"{out} holds the study {stored.get('study')}: choose another --out")
    if stored:
        _check_same(out, stored, options)
    elif (out / "reference.json").exists():  # the demo wrote it before it was a study like the others
        raise UserError(f"{out} holds a demo of an earlier version: delete it, or choose another --out")
    decided = stored or (out / "results").exists() or "precision" in own_fields(definition)
    fixed = {} if decided else {"precision": _precision(options.overrides)}
    return Request(
        out=out,
        preset=options.preset or stored.get("preset", definition.preset),
        seeds=options.seeds or stored.get("seeds", definition.seeds),
        placements=tuple(options.placements or stored.get("placements", ())),
        conditions=tuple(options.conditions or stored.get("conditions", ())),
        tuned=options.tuned or stored.get("tuned", False),
        lengths=options.lengths or tuple(stored.get("lengths", ())),
        depths=options.depths or tuple(stored.get("depths", ())),
        overrides={**stored.get("overrides", {}), **options.overrides, **fixed},
        workers=options.workers,
        stack=options.stack,
    )


def _precision(overrides: Mapping[str, Any]) -> str:
    """The precision of a new study, so that "auto" is the same on every machine that works on it."""
    asked = str(overrides.get("precision", "auto"))
    if asked != "auto":
        return asked
    dtype = pick_autocast(asked, pick_device(str(overrides.get("device", "auto"))))
    return str(dtype or torch.float32).removeprefix("torch.")


def _check_same(out: Path, stored: Mapping[str, Any], options: Options) -> None:
    """Refuse options that change the runs of a folder; seeds, methods, conditions and workers may differ.

    Raises:
        UserError: naming the option, what the folder has and what was given.
    """
    given = {**options.overrides, **({"preset": options.preset} if options.preset else {})}
    there = {**stored["overrides"], "preset": stored["preset"]}
    for name, value in given.items():
        if str(there.get(name)) != str(value):
            had = f"--{name} {there[name]}" if name in there else f"no --{name}"
            raise UserError(f"{out} holds this study with {had}, asked for is {value}: choose another --out")
    if options.tuned and not stored["tuned"]:
        raise UserError(f"{out} holds this study without --tuned: choose another --out")


def _print_answer(findings: Findings, console: Console) -> None:
    """Print the first table on stdout, in aligned Markdown, and the sentences on the console."""
    answer = Console(highlight=False, soft_wrap=True)
    answer.print(findings.tables[0].markdown(padded=True), markup=False)
    for sentence in (findings.answer, *findings.conclusions):
        console.print(sentence, markup=False)


def _lengths(text: str) -> tuple[int, ...]:
    """Read `0.3M,1M,3000000`."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    try:
        parts = [part.strip().upper() for part in text.split(",")]
        found = sorted({round(float(part.rstrip("KMB")) * units.get(part[-1:], 1)) for part in parts})
    except (ValueError, OverflowError):
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of tokens such as 0.3M,1M,3M")
    return tuple(found)


def _depths(text: str) -> tuple[int, ...]:
    """Read `12,64`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of blocks such as 12,64")
    return tuple(sorted(set(map(int, parts))))
