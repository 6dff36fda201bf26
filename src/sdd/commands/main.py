"""The `sdd` command."""

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdd.commands.parser import Parser, base_config, port_number, positive_int
from sdd.errors import Interrupted, RunFailed, UserError, is_out_of_memory, one_line
from sdd.train import config_io
from sdd.train.parallel import joined, speaks, supervised, tell

#: Options with a short name of their own; every other field goes by its dotted name.
SHORT = {
    "placement": "model.placement",
    "init_scale": "model.init_scale",
    "lr": "optim.lr",
    "warmup": "optim.warmup",
    "data": "data.path",
    "steps": "steps",
    "seed": "seed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 the user's mistake, 3 the run failed, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a file may be no text, or not of the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO if speaks() else logging.ERROR, format="%(message)s")
    return supervised(lambda: _exit_code(args))


def _exit_code(args: list[str]) -> int:
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        tell(f"sdd: {one_line(error)}", error.rank)
        return 2
    except RunFailed as error:
        tell(f"sdd: the run failed: {one_line(error)}", error.rank)
        return 3
    except Interrupted as error:
        tell(f"sdd: {one_line(error)}")
        return 130
    except KeyboardInterrupt:
        tell("sdd: interrupted")
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
    """Tell it in whichever process of a job meets it: nobody knows whether the others do."""
    tell(f"sdd: failed: {line}", int(os.environ.get("RANK", 0)))
    return 3


def _drop_stdout() -> None:
    """Let what could not be printed not be tried again at exit, where it would end in a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(args: list[str]) -> int:
    commands = {
        "train": (_train, "train a preset"),
        "resume": (_resume, "go on with an interrupted run"),
        "report": (_report, "a page with curves, settings and samples of one or more runs"),
        "generate": (_generate, "continue a text with a trained run"),
        "eval": (_eval, "held-out loss and bits per byte of a run"),
        "probe": (_probe, "statistics of a checkpoint's activations, gradients and weights on given data"),
        "plan": (_plan, "memory, time and GPU-hours of a preset on given GPUs, before anything is run"),
        "bench": (_bench, "time of fused operations and of training steps on this machine"),
        "presets": (_presets, "list the presets and placements, or show one"),
        "study": (_study, "run a study and write its page"),
        "tokenize": (_tokenize, "turn text, JSON lines, parquet or a dataset into token files"),
    }
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, commands))
        print("usage: sdd COMMAND ...   (sdd COMMAND --help explains)\n")
        for name, (_, about) in commands.items():
            print(f"  {name:{width}}  {about}")
        return 0 if args else 2
    if args[0] == "--version":
        from sdd import __version__

        print(__version__)
        return 0
    if args[0] not in commands:
        raise UserError(f"no command {args[0]!r}{config_io.nearest(args[0], list(commands))}; see sdd --help")
    return commands[args[0]][0](args[1:])


def _train(args: list[str]) -> int:
    from sdd.train.config import resolve
    from sdd.train.starting import fit_vocabulary
    from sdd.train.trainer import start

    with joined() as world:
        config, out, as_json, own_vocabulary, port = world.together(lambda: _train_request(args))
        if out is None and world.may_restart:
            raise UserError("torchrun --max-restarts needs --out RUN, by which a restarted job finds its run")
        out = out or world.on_main(lambda: _free_directory(args[0], config))
        if not own_vocabulary:
            config = fit_vocabulary(config, world.in_turn(lambda: resolve(config)))
        live = world.together(lambda: _live_page(port, world))
        return _finish(start(config, out, world), as_json, live)


def _train_request(args: list[str]) -> tuple[Any, Path | None, bool, bool, int | None]:
    """The run, its directory if named, whether to answer in JSON, whether the vocabulary was given, --live's port."""
    from sdd.models import model_presets

    parser = Parser(
        prog="sdd train",
        description="Train a preset. Every field of the run can be set; what is not set comes from the preset.",
        usage="sdd train PRESET [--out RUN] [--placement NAME] [--steps N] [--lr X] [OPTIONS]",
        allow_abbrev=False,
    )
    parser.add_argument("preset", metavar="PRESET", help=", ".join(model_presets) + "; or the path of a config.json")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run directory (default: runs/PRESET-PLACEMENT)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_live(parser)
    parser.add_argument("--printed-shape", action="store_true", help="581m to 2b: 8 kv heads and 100,278 tokens")
    _add_fields(parser)
    options = vars(parser.parse_known(args))
    base = base_config(options.pop("preset"), options.pop("printed_shape"))
    out, as_json, port = options.pop("out"), options.pop("json"), options.pop("live")
    overrides = {SHORT.get(name, name): _value(text) for name, text in options.items() if text is not None}
    return config_io.with_overrides(base, overrides), out, as_json, "model.vocab_size" in overrides, port


def _resume(args: list[str]) -> int:
    from sdd.train.trainer import reopen

    with joined() as world:
        options = world.together(lambda: _resume_request(args))
        live = world.together(lambda: _live_page(options.live, world))
        return _finish(reopen(options.run, options.steps, world), options.json, live)


def _resume_request(args: list[str]) -> argparse.Namespace:
    parser = Parser(prog="sdd resume", description="Go on with a run from its newest whole checkpoint.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--steps", type=positive_int, help="a new total number of steps")
    _add_live(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_known(args)


def _finish(trainer: Any, as_json: bool, live: Any) -> int:
    with live.serving(trainer.run_dir.path) if live else nullcontext():
        result = trainer.run()
    if not trainer.world.is_main:
        return 0
    if as_json:
        print(json.dumps(result))
        return 0
    bits = result["eval_bits_per_byte"]
    print(
        f"done: {result['steps']:,} steps, held-out loss {result['eval_loss']:.4f}"
        + (f", {bits:.4f} bits per byte" if bits is not None else "")
        + f"; see it with: sdd report {trainer.run_dir.path}"
    )
    return 0


def _add_live(parser: argparse.ArgumentParser) -> None:
    about = "show the report on 127.0.0.1:PORT while training (default 8765, or a free one)"
    parser.add_argument("--live", metavar="PORT", nargs="?", type=port_number, const=0, help=about)


def _live_page(port: int | None, world: Any) -> Any:
    """What serves the report while training, if that was asked for; on the first process only."""
    if port is None or not world.is_main:
        return None
    from sdd.report.serve import LivePage

    live = LivePage(port)
    print(f"the report, until the run ends: {live.url} (for browsers on this machine)", file=sys.stderr, flush=True)
    return live


def _report(args: list[str]) -> int:
    from sdd.report.page import write_report

    parser = Parser(prog="sdd report", description="Write one self-contained page about one or more runs.")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run)")
    options = parser.parse_known(args)
    out = options.out or options.runs[0] / "report.html"
    print(*write_report(options.runs, out), f"wrote {out}", sep="\n")
    return 0


def _generate(args: list[str]) -> int:
    from sdd.commands.generate import main as generate

    return generate(args)


def _eval(args: list[str]) -> int:
    from sdd.evals.text import evaluate_run

    parser = Parser(prog="sdd eval", description="Loss and bits per byte of a run on held-out text.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file (default: all of the run's own held-out data)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_known(args)
    result = evaluate_run(options.run, options.text)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:15} {value}" for name, value in result.items()))
    return 0


def _probe(args: list[str]) -> int:
    from sdd.commands.probe import run

    return run(args)


def _plan(args: list[str]) -> int:
    from sdd.commands.plan import run

    return run(args)


def _bench(args: list[str]) -> int:
    from sdd.commands.bench import run

    return run(args)


def _presets(args: list[str]) -> int:
    from sdd.models.describe import list_presets, show_preset

    parser = Parser(prog="sdd presets", description="List presets and placements, or show one preset.")
    parser.add_argument("name", metavar="PRESET", nargs="?", help="a preset to show")
    parser.add_argument("--placement", default="sdd", help="the placement to show it with (default sdd)")
    parser.add_argument("--json", action="store_true", help="print the config as JSON")
    options = parser.parse_known(args)
    if options.name is None:
        print(list_presets())
        return 0
    base = base_config(options.name)
    config = replace(base, model=replace(base.model, placement=config_io.find_placement(options.placement)))
    print(json.dumps(config_io.to_dict(config), indent=2) if options.json else show_preset(options.name, config.model))
    return 0


def _tokenize(args: list[str]) -> int:
    from sdd.commands.tokenize import main as tokenize

    return tokenize(args)


def _study(args: list[str]) -> int:
    from sdd.commands.study import Options, run_study, studies

    parser = Parser(
        prog="sdd study",
        description="Run a study: a grid of runs, tables, figures and a page. Options default to those that --out has.",
        usage="sdd study NAME [--preset P] [--seeds N] [--workers W] [--out DIR] [OPTIONS]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name", metavar="NAME", help="; ".join(f"{name}: {study.question}" for name, study in studies.items())
    )
    parser.add_argument("--out", type=Path, help="folder of its runs, results and page (default: studies/NAME)")
    parser.add_argument("--preset", help="model and length of the runs (default nano)")
    parser.add_argument("--seeds", type=positive_int, help="seeds a setting (default 3, of the demo 1)")
    parser.add_argument(
        "--workers", type=positive_int, help="runs at once (default: one a GPU, or a core, at most four)"
    )
    parser.add_argument("--placements", metavar="A,B", help="the methods to compare (default: the study's)")
    parser.add_argument("--tuned", action="store_true", help="robustness: tune the learning rate of every cell")
    _add_fields(parser)
    options = vars(parser.parse_known(args))
    name, out = options.pop("name"), options.pop("out")
    if name not in studies:
        near = config_io.nearest(name, list(studies))
        raise UserError(f"no study {name!r}{near}; choose one of {', '.join(studies)}")
    asked = {key: options.pop(key) for key in ("preset", "seeds", "workers", "tuned")}
    asked["placements"] = tuple(filter(None, (options.pop("placements") or "").split(",")))
    overrides = {SHORT.get(key, key): _value(text) for key, text in options.items() if text is not None}
    return run_study(name, out or Path("studies") / name, Options(**asked, overrides=overrides))


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """One option for every field of the config; values stay text and are checked against the field's type."""
    short = {dotted: name for name, dotted in SHORT.items()}
    for dotted, hint, about in config_io.fields():
        name = short.get(dotted)
        flags = [f"--{name.replace('_', '-')}"] if name else []
        if dotted != name:
            flags.append(f"--{dotted}")
        parser.add_argument(
            *flags,
            dest=name or dotted,
            metavar=config_io.describe_type(hint),
            help=about.replace("%", "%%"),
        )


def _value(text: str) -> Any:
    return None if text.lower() == "none" else text


def _free_directory(preset: str, config: Any) -> Path:
    """runs/PRESET-PLACEMENT, with a number if that is taken."""
    name = f"{Path(preset).stem}-{config.model.placement.name or 'own'}"
    candidates = [Path("runs") / name, *(Path("runs") / f"{name}-{number}" for number in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())
