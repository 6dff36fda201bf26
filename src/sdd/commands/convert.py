"""`sdd convert`: a run goes on with SDD at some of its projections, calibrated from its newest checkpoint."""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from sdd.commands.parser import Parser, listed, positive_int
from sdd.conversion.spreads import error_lines
from sdd.errors import UserError
from sdd.models import ModelConfig
from sdd.placement import Placement
from sdd.train.config_io import find_placement
from sdd.train.converting import convert_run, with_layers


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("sdd convert", "Convert a run in mid-course: SDD at some projections, the rest carried over.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory; it is only read")
    parser.add_argument("--out", metavar="NEW", type=Path, required=True, help="run directory of the converted run")
    parser.add_argument("--placement", metavar="NAME", help="the run's placement with more norms on projections")
    about = "projections to convert: o_proj,down_proj or patterns like 'blocks.3.*'"
    parser.add_argument("--layers", metavar="L,L", type=listed(str), help=about)
    parser.add_argument("--heads", action="store_true", help="with --layers: norms of q, k and v for each head")
    about = "training sequences to calibrate on (default 16)"
    parser.add_argument("--sequences", metavar="N", type=positive_int, default=16, help=about)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_known(args)
    if (options.placement is None) == (options.layers is None):
        raise UserError("give either --placement NAME or --layers L,L: where the new norms are to stand")
    if options.heads and options.layers is None:
        raise UserError("--heads goes with --layers: a placement says itself what its norms are")
    choose = partial(_choose, placement=options.placement, layers=options.layers, heads=options.heads)
    say = partial(print, file=sys.stderr)
    done = convert_run(options.run, options.out, choose, sequences=options.sequences, say=say)
    if options.json:
        print(json.dumps({"run": str(options.out), **asdict(done)}))
        return 0
    print(
        *error_lines(done.errors.items()),
        "",
        f"step {done.step:,}: held-out loss {done.before:.4f} before, {done.after:.4f} right after conversion to "
        f"{done.placement}",
        f"go on with: sdd resume {options.out} (a finished run: --steps N)",
        sep="\n",
    )
    return 0


def _choose(model: ModelConfig, placement: str | None, layers: list[str] | None, heads: bool) -> Placement:
    return with_layers(model, layers, heads) if layers else find_placement(placement or "")
