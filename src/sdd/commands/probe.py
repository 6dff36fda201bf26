"""`sdd probe`: the statistics of a checkpoint, or of untrained weights, on given data, without an update."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdd.commands.parser import Parser, base_config, positive_int
from sdd.data import Loader
from sdd.data.spec import absolute as absolute_spec
from sdd.errors import UserError
from sdd.evals.text import load_trained
from sdd.models import LanguageModel, model_presets
from sdd.probing import Probe
from sdd.probing.probe_file import Row
from sdd.terminal import aligned
from sdd.train import config_io
from sdd.train.checkpoint import load_checkpoint
from sdd.train.config import RunConfig, resolve
from sdd.train.parallel import ALONE, pick_autocast, pick_device
from sdd.train.router_stats import RouterStats
from sdd.train.sharding import build_model
from sdd.train.starting import fit_vocabulary

#: Loads of more experts than a screen is wide are left to --json.
_MOST_EXPERTS = 16
#: The columns of the tables: heading and statistic.
COLUMNS = {
    "rms": "rms",
    "grad rms": "grad_rms",
    "eps/mean z^2": "eps_ratio",
    "|W|": "weight_norm",
    "W grad rms": "weight_grad_rms",
    "|alpha|": "alpha_norm",
    "max logit": "logit_max",
    "entropy": "entropy",
}


@dataclass(frozen=True)
class Subject:
    """What is probed.

    Attributes:
        name: what tables call it.
        config: its run.
        model: with its weights.
        step: optimiser steps that the weights have behind them.
    """

    name: str
    config: RunConfig
    model: LanguageModel
    step: int


@dataclass(frozen=True)
class Probed:
    """What was found.

    Attributes:
        loss: nats a token, with z-loss and the routers' losses where the config has them.
        row: as in probe.jsonl.
        routing: of a mixture of experts, the columns of metrics.jsonl (`sdd.train.router_stats`); else empty.
    """

    loss: float
    row: Row
    routing: dict[str, Any]


def run(args: list[str]) -> int:
    """The command; returns its exit code.

    Raises:
        UserError: for a mistake in the arguments, or data that do not fit.
    """
    options = _parser().parse_known(args)
    subjects = find_subjects(options.subjects, options.placement or [])
    found = [probe_subject(subject, options.data, options.batches) for subject in subjects]
    if options.json:
        answers = [
            {
                "name": subject.name,
                "placement": subject.config.model.placement.name,
                "data": options.data or subject.config.data.path,
                "loss": each.loss,
                **each.row,
                **each.routing,
            }
            for subject, each in zip(subjects, found, strict=True)
        ]
        print(json.dumps(answers))
        return 0
    for subject, each in zip(subjects, found, strict=True):
        print(f"{subject.name}   step {subject.step:,}   loss {each.loss:.4f}")
    names, rows = [subject.name for subject in subjects], [each.row for each in found]
    tables = [
        layers_table(names, rows),
        sites_table(names, rows),
        routing_table(names, [each.routing for each in found]),
    ]
    print("\n".join(line for table in tables if table for line in ("", *table)))
    return 0


def find_subjects(words: Sequence[str], placements: Sequence[str]) -> list[Subject]:
    """The runs, checkpoints or presets that the command line names, one or two.

    Raises:
        UserError: if there is none of that name, a placement is given for trained weights, or there are too many.
    """
    configs = [(word, name) for word in words for name in (placements or [None])]
    if len(configs) > 2:
        raise UserError(f"{len(configs)} models were named: at most two stand side by side")
    return [_subject(word, placement) for word, placement in configs]


def probe_subject(subject: Subject, data: str | None, batches: int) -> Probed:
    """Forward and backward passes over the first batches of the data, without an update.

    Args:
        subject: the model.
        data: as in `sdd train --data`; None for the data that its config names.
        batches: how many of the config's batches; they pass in the config's parts.

    Raises:
        UserError: if the data cannot be read or have a larger vocabulary.
    """
    config, model = subject.config, subject.model
    if data is not None:
        config = replace(config, data=replace(config.data, path=absolute_spec(data)))
    source = resolve(config)
    if source.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{source.name} has {source.vocab_size} tokens, {subject.name} knows {config.model.vocab_size}: they need "
            "one tokenizer"
        )
    loader = Loader(source.parts, config.data.batch_size, config.model.context, config.seed)
    device = model.embed.weight.device
    dtype = pick_autocast(config.precision, device)
    eos = source.eos if config.data.document_mask else None
    model.train().checkpoint_blocks = config.activation_checkpointing
    parts = [part for index in range(batches) for part in loader.batch(index).chunk(config.accumulate)]
    probe, total, passes = Probe(model, every=1), torch.zeros((), device=device), []
    with probe.step(number=subject.step):
        for part in parts:
            tokens = part.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = model(
                    tokens[:, :-1], tokens[:, 1:], document_eos=eos, z_loss=config.optim.z_loss, detailed=True
                )
            (found.total / len(parts)).backward()
            total += found.total.detach() / len(parts)
            passes.append(found.routing)
    probe.close()
    model.zero_grad()
    assert probe.latest is not None
    routing = RouterStats(passes, ALONE) if config.model.moe else None
    return Probed(total.item(), probe.latest, {**routing.row(), **routing.loads()} if routing else {})


def layers_table(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The residual stream, layer by layer."""
    stats = {"rms": "rms", "cosine to the layer before": "cosine", "grad rms": "grad_rms"}
    lines = []
    for layer in range(max(len(row["layers"].get("rms", ())) for row in rows)):
        cells = []
        for row in rows:
            shown = {stat: dict(enumerate(values, stat == "cosine")) for stat, values in row["layers"].items()}
            cells.append([shown.get(stat, {}).get(layer) for stat in stats.values()])
        lines += _beside(f"layer {layer}", names, cells)
    return _table(["residual stream", *stats], names, lines)


def sites_table(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Every site with the statistics that it has."""
    sites = dict.fromkeys(site for row in rows for site in row["sites"])
    lines = []
    for site in sites:
        cells = [[row["sites"].get(site, {}).get(stat) for stat in COLUMNS.values()] for row in rows]
        lines += _beside(site, names, cells)
    return _table(["site", *COLUMNS], names, lines)


def routing_table(names: Sequence[str], routings: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the routers spread the tokens, block by block, and each expert's load; empty if no model has experts."""
    heading = {"entropy": "entropy", "busiest / mean": "worst_load", "without tokens": "dead_experts"}
    layers = [routing.get("routing", {}) for routing in routings]
    widest = max((len(load) for routing in routings for load in routing.get("expert_load", ())), default=0)
    widest = widest if widest <= _MOST_EXPERTS else 0
    lines = []
    for block in range(max(len(layer.get("entropy", ())) for layer in layers)):
        cells = []
        for layer, routing in zip(layers, routings, strict=True):
            there = block < len(layer.get("entropy", ()))
            numbers = [layer[column][block] if there else None for column in heading.values()]
            loads = routing["expert_load"][block][:widest] if there else []
            cells.append([*numbers, *loads, *[None] * (widest - len(loads))])
        lines += _beside(f"block {block}", names, cells)
    return _table(["router", *heading, *(f"{expert}" for expert in range(widest))], names, lines) if lines else []


def _beside(label: str, names: Sequence[str], cells: Sequence[Sequence[Any]]) -> list[list[str]]:
    """The lines of one thing: its numbers, or those of both subjects and the second's over the first's."""
    if len(cells) == 1:
        return [[label, *map(_number, cells[0])]]
    ratios = [_ratio(second, first) for first, second in zip(*cells, strict=True)]
    lines = [
        [name, *map(_number, numbers)]
        for name, numbers in zip((*names, "ratio"), (*cells, ratios), strict=True)
        if any(number is not None for number in numbers)
    ]
    return [["" if index else label, *line] for index, line in enumerate(lines)]


def _table(heading: Sequence[str], names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    first, *others = heading
    whole = [first, *([""] if len(names) > 1 else []), *others]
    return aligned([whole, *lines], right=range(len(names), len(whole)))


def _ratio(second: Any, first: Any) -> float | None:
    if second is None or first is None or not float(first):
        return None
    return float(second) / float(first)


def _number(value: Any) -> str:
    return "" if value is None else f"{float(value):.3g}"


def _subject(word: str, placement: str | None) -> Subject:
    path = Path(word)
    if (path / "config.json").is_file() or (path / "state.json").is_file():
        if placement is not None:
            raise UserError(f"{word} has weights of its own placement: --placement is for presets")
        return _trained(path)
    if path.is_dir():
        raise UserError(f"{word} is neither a run (config.json) nor a checkpoint (state.json)")
    config = base_config(word)
    if placement is not None:
        config = replace(config, model=replace(config.model, placement=config_io.find_placement(placement)))
    config = fit_vocabulary(config, resolve(config))
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(LanguageModel(config.model, "meta"), device, pick_autocast(config.precision, device), ALONE)
    return Subject(f"{path.stem} {config.model.placement.name or 'own'}", config, model, 0)


def _trained(path: Path) -> Subject:
    if (path / "config.json").is_file():
        trained = load_trained(path)
        return Subject(path.name, trained.config, trained.model, trained.step)
    run = path.absolute().parent.parent
    if not (run / "config.json").is_file():
        raise UserError(f"{path} lies in no run: {run} has no config.json")
    config = config_io.load(run / "config.json")
    model = LanguageModel(config.model).to(pick_device(config.device))
    return Subject(f"{run.name}/{path.name}", config, model, load_checkpoint(path, model)["step"])


def _parser() -> Parser:
    parser = Parser(
        prog="sdd probe",
        description="Statistics of activations, gradients and weights, site by site, on given data, without an update.",
        usage="sdd probe RUN|CHECKPOINT|PRESET [ANOTHER] [--placement NAME] [--data PATH] [OPTIONS]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "subjects",
        metavar="RUN|CHECKPOINT|PRESET",
        nargs="+",
        help="a run (its newest checkpoint), a checkpoint (RUN/checkpoints/step-...), or untrained weights: "
        + ", ".join(model_presets)
        + " or a config.json; two stand side by side",
    )
    parser.add_argument("--placement", action="append", help="of a preset; given twice, the two stand side by side")
    parser.add_argument("--data", metavar="PATH", help="as in sdd train (default: the training data of the run)")
    parser.add_argument("--batches", type=positive_int, default=1, help="of the run's batch size (default 1)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser
