"""`sdd train`: a new run from a preset; and what `sdd resume` shares with it."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from sdd.commands.configs import add_fields, add_preset, base_config, overrides
from sdd.commands.parser import Parser, whole_number
from sdd.errors import UserError
from sdd.report.serve import LivePage
from sdd.train import RunConfig, Trainer, config_io
from sdd.train.parallel import World, joined
from sdd.train.schedule import fit
from sdd.train.trackers import TRACKERS, check_tracker
from sdd.train.trainer import start

#: The fields that decide whether a schedule fits its run.
_OF_THE_SCHEDULE = {"steps", "optim.warmup", "optim.schedule", "optim.decay_fraction"}


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    with joined() as world:
        config, options = world.together(lambda: parse(args))
        if options.out is None and world.may_restart:
            raise UserError("torchrun --max-restarts needs --out RUN, by which a restarted job finds its run")
        out = options.out or world.on_main(lambda: _free_directory(options.preset, config))
        live = world.together(lambda: live_page(options, world))
        trainer = start(config, out, world, fit=getattr(options, "model.vocab_size") is None)
        if options.fitted:
            trainer.log.say(options.fitted)
        return finish(trainer, options, live)


def parse(args: list[str]) -> tuple[RunConfig, argparse.Namespace]:
    """The run that the arguments ask for, and all options; `fitted` is the line about its schedule, or None."""
    parser = Parser(
        "sdd train",
        "Train a preset. Every field of the run can be set; what is not set comes from the preset.",
        "PRESET [--out RUN] [--placement NAME] [--steps N] [--lr X] [OPTIONS]",
    )
    add_preset(parser)
    parser.add_argument("--out", type=Path, metavar="RUN", help="run directory (default: runs/PRESET-PLACEMENT)")
    add_shared(parser)
    add_fields(parser)
    options = parser.parse_known(args)
    given = overrides(options)
    config, options.fitted = config_io.with_overrides(base_config(options.preset, options.printed_shape), given), None
    # the schedule of a config.json that is run again stays as it is
    if Path(options.preset).suffix != ".json" or _OF_THE_SCHEDULE & given.keys():
        config, options.fitted = fit(config, given)
    return config, options


def add_shared(parser: Parser) -> None:
    """Add the options that `sdd resume` has too."""
    parser.add_argument(
        "--live",
        metavar="PORT",
        nargs="?",
        type=whole_number(1, 65535),
        const=0,
        help="show the report on 127.0.0.1:PORT while training (default 8765, or a free one)",
    )
    about = f"give the numbers to {', '.join(TRACKERS)} or none (default: the run's own; else tensorboard, if there)"
    parser.add_argument("--tracker", metavar="NAME", type=check_tracker, help=about)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def live_page(options: argparse.Namespace, world: World) -> LivePage | None:
    """The server of the report while training, if it was asked for; on the first process only."""
    if options.live is None or not world.is_main:
        return None
    live = LivePage(options.live)
    print(f"the report, until the run ends: {live.url} (for browsers on this machine)", file=sys.stderr, flush=True)
    return live


def finish(trainer: Trainer, options: argparse.Namespace, live: LivePage | None) -> int:
    """Train to the end and print the result; returns the exit code."""
    trainer.log.tracker = options.tracker
    with live.serving(trainer.run_dir.path) if live else nullcontext():
        result = trainer.run()
    if not trainer.world.is_main:
        return 0
    if options.json:
        print(json.dumps(result))
        return 0
    bits = result["eval_bits_per_byte"]
    print(
        f"done: {result['steps']:,} steps, held-out loss {result['eval_loss']:.4f}"
        + (f", {bits:.4f} bits per byte" if bits is not None else "")
        + f"; see it with: sdd report {trainer.run_dir.path}"
    )
    return 0


def _free_directory(preset: str, config: RunConfig) -> Path:
    """runs/PRESET-PLACEMENT, with a number if that is taken."""
    name = f"{Path(preset).stem}-{config.model.placement.name or 'own'}"
    candidates = [Path("runs") / name, *(Path("runs") / f"{name}-{number}" for number in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())
