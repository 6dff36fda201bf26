"""`sdd plan`: what a run needs of given GPUs."""

import argparse
import json
import re

from sdd.commands.configs import add_fields, add_preset, base_config, overrides
from sdd.commands.parser import Parser, positive_int
from sdd.errors import UserError
from sdd.plan.estimate import make_plan
from sdd.plan.gpus import find_gpu, gpus
from sdd.plan.table import show_plan
from sdd.train import config_io

#: Fields of the run that have an option.
_FIELDS = {
    "model.placement": "placement",
    "model.context": "context",
    "data.batch_size": "batch-size",
    "activation_checkpointing": "activation-checkpointing",
    "chunked_loss": "chunked-loss",
    "precision": "precision",
    "optim.name": "optimizer",
}
#: Largest context and batch: sizes of tensors overflow beyond it.
_LARGEST = 10**8
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_known(args)
    base = base_config(options.preset, options.printed_shape)
    # the split into micro-batches is what is planned
    config = config_io.with_overrides(base, {"accumulate": 1} | overrides(options))
    largest = max(config.model.context, config.data.batch_size)
    if largest > _LARGEST:
        raise UserError(f"{largest:,} is too large to plan: context and batch size are at most {_LARGEST:,}")
    gpu = find_gpu(options.gpu)
    plan = make_plan(config, gpu, options.gpus, mfu=options.mfu, tokens=options.tokens, micro_batch=options.micro_batch)
    if options.json:
        print(json.dumps({"preset": options.preset} | plan.to_dict(), indent=2))
    else:
        print(show_plan(options.preset, plan))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "sdd plan",
        "Memory, time and GPU-hours that a run needs on given GPUs, before anything is run.",
        "PRESET --gpu NAME [--gpus N] [OPTIONS]",
    )
    add_preset(parser)
    parser.add_argument("--gpu", metavar="NAME", required=True, help=", ".join(gpus))
    parser.add_argument("--gpus", metavar="N", type=positive_int, default=1, help="how many (default 1)")
    parser.add_argument("--tokens", type=_tokens, help="to train on, 200B or 2e11 (default: the preset's steps)")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed model FLOPs utilisation (default 0.4)")
    parser.add_argument("--micro-batch", type=positive_int, help="sequences at once on a GPU (default: what fits)")
    add_fields(parser, _FIELDS, dotted_names=False)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def _tokens(text: str) -> int:
    """An argparse type: a number of tokens, as 200B, 1.5T, 2e11 or 200_000_000_000."""
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)([kmbt]?)", text.strip().lower())
    number = round(float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2]]) if found else 0
    if not 1 <= number <= 10**18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, such as 200B or 2e11")
    return number
