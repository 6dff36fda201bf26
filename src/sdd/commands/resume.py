"""`sdd resume`: an interrupted run goes on."""

import argparse
from pathlib import Path

from sdd.commands.configs import add_fields, overrides
from sdd.commands.parser import Parser, positive_int
from sdd.commands.train import add_shared, finish, live_page
from sdd.train.parallel import joined
from sdd.train.trainer import reopen

#: The fields of a run that may be others from here on begin so.
_CHANGEABLE = ("parallel.", "accumulate")


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    with joined() as world:
        options = world.together(lambda: _parse(args))
        live = world.together(lambda: live_page(options, world))
        return finish(reopen(options.run, options.steps, world, overrides(options, _CHANGEABLE)), options, live)


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser("sdd resume", "Go on with a run from its newest whole checkpoint.", allow_abbrev=True)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--steps", type=positive_int, help="a new total number of steps")
    add_fields(parser, {}, only=_CHANGEABLE)
    add_shared(parser)
    return parser.parse_known(args)
