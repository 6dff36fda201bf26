"""`sdd plan`: what a run needs of given GPUs."""

import argparse
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import TextColumn

from sdd.commands.configs import add_fields, add_preset, base_config, overrides
from sdd.commands.parser import Parser, positive_int
from sdd.errors import UserError
from sdd.parallel.layout import ParallelConfig
from sdd.plan.cluster import Cluster
from sdd.plan.estimate import make_plan
from sdd.plan.gpus import Gpu, find_gpu, gpus
from sdd.plan.table import show_plan
from sdd.terminal import progress_bar, stderr_console
from sdd.train import RunConfig, config_io

if TYPE_CHECKING:
    from sdd.plan.layouts import LayoutPlan, Planner, Search

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
#: The most GPUs whose layouts are searched: with their number grow that of layouts and the time that each takes.
_SEARCHED = 1024
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
    if options.layouts or options.best or config.parallel != ParallelConfig():
        return _plan_layouts(options, config, gpu)
    plan = make_plan(config, gpu, options.gpus, mfu=options.mfu, tokens=options.tokens, micro_batch=options.micro_batch)
    if options.json:
        print(json.dumps({"preset": options.preset} | plan.to_dict(), indent=2))
    else:
        print(show_plan(options.preset, plan))
    return 0


def _plan_layouts(options: argparse.Namespace, config: RunConfig, gpu: Gpu) -> int:
    """Plan the layout that the run names, or all of them."""
    from sdd.plan.layout_table import show_layout, show_search
    from sdd.plan.layouts import Planner

    if config.parallel.context_attention == "ring":
        raise UserError("a plan traces gathered keys and values: leave out --parallel.context_attention ring")
    searched = options.layouts or options.best
    if searched and overrides(options, "parallel.").keys() - {"parallel.reshard"}:
        raise UserError("--layouts and --best look at all layouts: leave its sizes out, --parallel.tensor and the like")
    if searched and options.gpus > _SEARCHED:
        raise UserError(
            f"--layouts and --best search layouts of up to {_SEARCHED:,} GPUs, not of {options.gpus:,}: plan one by "
            "its sizes, --parallel.tensor 8 for instance, or fewer GPUs"
        )
    cluster = Cluster(options.gpus_per_node, options.link or gpu.link, options.network or gpu.network)
    config = replace(config, steps=config.steps if options.tokens is None else _steps(options.tokens, config))
    planner = Planner(config, gpu, options.gpus, cluster, mfu=options.mfu, micro_batch=options.micro_batch)
    if not searched:
        plan = planner.plan(config.parallel)
        _answer(options, {"plan": plan.to_dict()}, show_layout(options.preset, plan), plan)
        return 0
    search = _searched(planner)
    if not (search.fitting or search.too_large):
        why = "; ".join(f"{len(found)}: {reason}" for reason, found in search.left_out.items())
        raise UserError(f"no layout of {options.gpus} GPUs is left ({why}): give another --gpus or --batch-size")
    if options.best and not search.fitting:
        least = min(search.too_large, key=lambda plan: plan.peak)
        raise UserError(
            f"no layout of {options.gpus} GPUs fits: the smallest ({least.layout}) takes {least.peak / 2**30:.1f} GiB "
            f"of {least.capacity / 2**30:.1f}: give more --gpus, or --activation-checkpointing true"
        )
    best = search.best if options.best else None
    found = {
        "layouts": [plan.to_dict() for plan in (*search.fitting, *search.too_large)],
        **({} if best is None else {"best": best.to_dict()}),
        "left_out": {why: [layout.sizes for layout in found] for why, found in search.left_out.items()},
    }
    text = show_search(options.preset, search)
    if best is not None:
        head = "Proposed: of those within 1% of the fastest, the one with the smallest states"
        text = "\n\n".join([text, head, show_layout(options.preset, best)])
    _answer(options, found, text, best)
    return 0


def _searched(planner: "Planner") -> "Search":
    with progress_bar(stderr_console(), TextColumn("layouts")) as bar:
        task = bar.add_task("", total=None, numbers="")

        def report(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, numbers=f"{done} of {of}")

        return planner.search(report)


def _steps(tokens: int, config: RunConfig) -> int:
    return math.ceil(tokens / config.tokens_per_step)


def _answer(options: argparse.Namespace, found: dict[str, Any], text: str, plan: "LayoutPlan | None") -> None:
    """Print what was found, and the command of a plan."""
    command = None if plan is None else _command(options, plan)
    if options.json:
        print(json.dumps({"preset": options.preset} | found | ({"command": command} if command else {}), indent=2))
    else:
        print(text if command is None else f"{text}\n\nTo run\n  {command}")


def _command(options: argparse.Namespace, plan: "LayoutPlan") -> str:
    """The line that trains under a plan; on each node, if there are several."""
    per_node = min(options.gpus_per_node, options.gpus)
    nodes = options.gpus // per_node
    name = Path(options.preset).stem
    words = ["torchrun", "--nproc-per-node", str(per_node), "-m", "sdd", "train", options.preset]
    if nodes > 1:
        words[1:1] = ["--nnodes", str(nodes)]
        words[5:5] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500", "--rdzv-id", name]
    given = overrides(options)
    given |= {} if options.tokens is None else {"steps": str(plan.case.run.steps)}
    of_layout = {f"parallel.{dim}" for dim in plan.layout.sizes}
    given = {dotted: value for dotted, value in given.items() if dotted not in of_layout}
    words += ["--printed-shape"] if options.printed_shape else []
    words += [word for dotted, value in given.items() for word in (f"--{dotted}", str(value))]
    words += plan.layout.words(base_config(options.preset).parallel).split()
    return shlex.join([*words, "--accumulate", str(plan.accumulate), "--out", f"runs/{name}"])


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
    parser.add_argument("--layouts", action="store_true", help="plan every layout of the GPUs that fits: traffic too")
    parser.add_argument("--best", action="store_true", help="the same, and propose one with its command")
    parser.add_argument("--gpus-per-node", metavar="N", type=positive_int, default=8, help="of a node (default 8)")
    parser.add_argument(
        "--link", metavar="GB/S", type=_bandwidth, help="a GPU to its node, one way (default: the GPU's)"
    )
    parser.add_argument(
        "--network", metavar="GB/S", type=_bandwidth, help="a GPU to other nodes, one way (default: 25, 50)"
    )
    add_fields(parser, _FIELDS, dotted_names=False)
    add_fields(parser, {}, only="parallel.")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def _bandwidth(text: str) -> float:
    """An argparse type: GB/s, more than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-3 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a bandwidth in GB/s, such as 50")
    return value


def _tokens(text: str) -> int:
    """An argparse type: a number of tokens, as 200B, 1.5T, 2e11 or 200_000_000_000."""
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)([kmbt]?)", text.strip().lower())
    number = round(float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2]]) if found else 0
    if not 1 <= number <= 10**18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, such as 200B or 2e11")
    return number
