"""`sdd plan`: memory, time and GPU-hours of a run."""

import argparse
import json
import re
from typing import Any

from sdd.commands.parser import Parser, base_config, positive_int
from sdd.errors import UserError
from sdd.models import model_presets
from sdd.plan.estimate import make_plan
from sdd.plan.gpus import find_gpu, gpus
from sdd.plan.table import show_plan
from sdd.train import RunConfig, config_io

#: Options that set a field of the run.
FIELDS = {
    "placement": "model.placement",
    "context": "model.context",
    "batch_size": "data.batch_size",
    "activation_checkpointing": "activation_checkpointing",
    "chunked_loss": "chunked_loss",
    "precision": "precision",
}
#: Largest context and batch: sizes of tensors beyond it overflow.
_LARGEST = 10**8
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def run(args: list[str]) -> int:
    """Run the command and return its exit code.

    Raises:
        UserError: for a mistake in the arguments.
    """
    options = _parser().parse_known(args)
    config = _config(options)
    gpu = find_gpu(options.gpu)
    plan = make_plan(config, gpu, options.gpus, mfu=options.mfu, tokens=options.tokens, micro_batch=options.micro_batch)
    if options.json:
        print(json.dumps({"preset": options.preset} | plan.to_dict(), indent=2))
    else:
        print(show_plan(options.preset, plan))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sdd plan",
        description="Memory, time and GPU-hours that a run needs on given GPUs, before it is started.",
        usage="sdd plan PRESET --gpu NAME [--gpus N] [OPTIONS]",
        allow_abbrev=False,
    )
    parser.add_argument("preset", metavar="PRESET", help=", ".join(model_presets) + "; or the path of a config.json")
    parser.add_argument("--gpu", metavar="NAME", required=True, help=", ".join(gpus))
    parser.add_argument("--gpus", metavar="N", type=positive_int, default=1, help="how many (default 1)")
    parser.add_argument("--tokens", type=_tokens, help="to train on, 200B or 2e11 (default: the preset's steps)")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed model FLOPs utilisation (default 0.4)")
    parser.add_argument("--micro-batch", type=positive_int, help="sequences at once on a GPU (default: what fits)")
    about = {dotted: (hint, text) for dotted, hint, text in config_io.fields()}
    for name, dotted in FIELDS.items():
        hint, text = about[dotted]
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=config_io.describe_type(hint), help=text)
    parser.add_argument("--printed-shape", action="store_true", help="581m to 2b: 8 kv heads and 100,278 tokens")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def _config(options: argparse.Namespace) -> RunConfig:
    values = vars(options)
    # the plan itself splits the batch into micro-batches
    overrides: dict[str, Any] = {"accumulate": 1}
    overrides |= {dotted: values[name] for name, dotted in FIELDS.items() if values[name] is not None}
    for name in ("context", "batch_size"):
        if (values[name] or "").isdecimal() and int(values[name]) > _LARGEST:
            raise UserError(f"{FIELDS[name]}={values[name]} is too large to plan: at most {_LARGEST:,}")
    return config_io.with_overrides(base_config(options.preset, options.printed_shape), overrides)


def _tokens(text: str) -> int:
    """Parse a number of tokens: 200B, 1.5T, 2e11, 200_000_000_000."""
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)([kmbt]?)", text.strip().lower())
    number = round(float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2]]) if found else 0
    if not 1 <= number <= 10**18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, such as 200B or 2e11")
    return number
