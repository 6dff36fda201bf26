"""`sdd probe`: the statistics of a checkpoint, or of untrained weights, on given data, without an update."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdd.commands.configs import base_config, with_placement
from sdd.commands.parser import Parser, positive_int
from sdd.data import Loader
from sdd.data.spec import absolute as absolute_spec
from sdd.errors import UserError
from sdd.evals.text import load_trained
from sdd.models import LanguageModel, model_presets
from sdd.probing import Probe
from sdd.terminal import aligned
from sdd.train.config import RunConfig, resolve
from sdd.train.parallel import ALONE, pick_autocast, pick_device
from sdd.train.router_stats import RouterStats
from sdd.train.sharding import build_model
from sdd.train.starting import fit_vocabulary

#: The numbers of one model in a table, by label of the line and name of the statistic.
Table = Mapping[str, Mapping[str, Any]]

#: Loads of more experts than fit on a screen are shown by --json only.
_MOST_EXPERTS = 16
#: Columns of the three tables: heading and statistic.
_LAYER_COLUMNS = {"rms": "rms", "cosine to the layer before": "cosine", "grad rms": "grad_rms"}
_SITE_COLUMNS = {
    "rms": "rms",
    "grad rms": "grad_rms",
    "eps/mean z^2": "eps_ratio",
    "|W|": "weight_norm",
    "W grad rms": "weight_grad_rms",
    "|alpha|": "alpha_norm",
    "max logit": "logit_max",
    "entropy": "entropy",
}
_ROUTER_COLUMNS = {"entropy": "entropy", "busiest / mean": "worst_load", "without tokens": "dead_experts"}


@dataclass(frozen=True)
class Subject:
    """A model to probe.

    Attributes:
        name: how the tables call it.
        config: its run.
        model: with its weights.
        step: optimiser steps that it was trained for.
    """

    name: str
    config: RunConfig
    model: LanguageModel
    step: int


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_known(args)
    subjects = find_subjects(options.subjects, options.placement or [None])
    answers = [measure(subject, options.data, options.batches) for subject in subjects]
    if options.json:
        print(json.dumps(answers))
        return 0
    for answer in answers:
        print(f"{answer['name']}   step {answer['step']:,}   loss {answer['loss']:.4f}")
    print(*tables(answers), sep="\n")
    return 0


def find_subjects(words: Sequence[str], placements: Sequence[str | None]) -> list[Subject]:
    """The models that the command line names, one or two.

    Args:
        words: runs, checkpoints or presets.
        placements: what a preset is probed with; None for its own.

    Raises:
        UserError: if there is none of that name, a placement is given for trained weights, or there are too many.
    """
    named = [(word, placement) for word in words for placement in placements]
    if len(named) > 2:
        raise UserError(f"{len(named)} models were named: at most two stand side by side")
    return [_subject(word, placement) for word, placement in named]


def _subject(word: str, placement: str | None) -> Subject:
    path = Path(word)
    if (path / "config.json").is_file() or (path / "state.json").is_file():
        if placement is not None:
            raise UserError(f"{word} has weights of its own placement: --placement is for presets")
        return _trained(path)
    if path.is_dir():
        raise UserError(f"{word} is neither a run (config.json) nor a checkpoint (state.json)")
    config = base_config(word) if placement is None else with_placement(base_config(word), placement)
    config = fit_vocabulary(config, resolve(config))
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(LanguageModel(config.model, "meta"), device, pick_autocast(config.precision, device), ALONE)
    return Subject(f"{path.stem} {config.model.placement.name or 'own'}", config, model, 0)


def _trained(path: Path) -> Subject:
    if (path / "config.json").is_file():
        name, trained = path.name, load_trained(path)
    else:
        run = path.absolute().parent.parent
        name, trained = f"{run.name}/{path.name}", load_trained(run, str(path.absolute()))
    return Subject(name, trained.config, trained.model, trained.step)


def measure(subject: Subject, data: str | None, batches: int) -> dict[str, Any]:
    """Forward and backward passes over the first batches of the data, without an update.

    Args:
        subject: the model.
        data: as in `sdd train --data`; None for the data that its config names.
        batches: how many of the config's batches; each passes in the parts that `accumulate` asks for.

    Returns:
        name, placement, data, and loss: nats a token, with z-loss and the routers' losses where the config has them;
        a row of probe.jsonl; of a mixture of experts, the routers' columns of metrics.jsonl.

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
    parts = [part.to(device) for index in range(batches) for part in loader.batch(index).chunk(config.accumulate)]
    probe, loss, passes = Probe(model, every=1), 0.0, []
    with probe.step(number=subject.step):
        for part in parts:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = model(part[:, :-1], part[:, 1:], document_eos=eos, z_loss=config.optim.z_loss, detailed=True)
            (found.total / len(parts)).backward()
            loss += found.total.item() / len(parts)
            passes.append(found.routing)
    probe.close()
    model.zero_grad()
    assert probe.latest is not None
    answer = {"name": subject.name, "placement": config.model.placement.name, "data": data or config.data.path}
    answer |= {"loss": loss, **probe.latest}
    if config.model.moe:
        routing = RouterStats(passes, ALONE)
        answer |= {**routing.row(), **routing.loads()}
    return answer


def tables(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The residual stream, the sites and the routers as lines; of two models side by side, and their ratio."""
    names = [answer["name"] for answer in answers]
    layers = [_by_index("layer", answer["layers"]) for answer in answers]
    routers = [_by_index("block", _router_columns(answer)) for answer in answers]
    most = max(len(loads) for answer in answers for loads in answer.get("expert_load", [()]))
    experts = {str(expert): f"expert {expert}" for expert in range(most if most <= _MOST_EXPERTS else 0)}
    return [
        *_table("residual stream", _LAYER_COLUMNS, names, layers),
        *_table("site", _SITE_COLUMNS, names, [answer["sites"] for answer in answers]),
        *_table("router", _ROUTER_COLUMNS | experts, names, routers),
    ]


def _router_columns(answer: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Statistics of the routers over blocks, the load of each expert among them; none without experts."""
    by_expert = enumerate(zip(*answer.get("expert_load", ()), strict=True))
    return answer.get("routing", {}) | {f"expert {expert}": loads for expert, loads in by_expert}


def _by_index(kind: str, columns: Mapping[str, Sequence[Any]]) -> Table:
    """Columns over layers as a table by layer; a cosine belongs to the later of its two layers."""
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for statistic, values in columns.items():
        for index, value in enumerate(values, start=statistic == "cosine"):
            table[f"{kind} {index}"][statistic] = value
    return table


def _table(heading: str, columns: Mapping[str, str], names: Sequence[str], found: Sequence[Table]) -> list[str]:
    """An empty line and a table of what the models have; no lines if none of them has anything."""
    two = len(names) == 2
    lines = []
    for label in dict.fromkeys(label for table in found for label in table):
        rows = [[table.get(label, {}).get(statistic) for statistic in columns.values()] for table in found]
        if two:
            rows.append([_ratio(second, first) for first, second in zip(*rows, strict=True)])
        for name, row in zip((*names, "ratio") if two else names, rows, strict=True):
            if any(number is not None for number in row):
                lines.append([label, *([name] if two else []), *map(_number, row)])
                label = ""  # once is enough
    whole = [heading, *([""] if two else []), *columns]
    return ["", *aligned([whole, *lines], right=range(len(names), len(whole)))] if lines else []


def _ratio(second: Any, first: Any) -> float | None:
    return None if second is None or first is None or not float(first) else float(second) / float(first)


def _number(value: Any) -> str:
    return "" if value is None else f"{float(value):.3g}"


def _parser() -> Parser:
    parser = Parser(
        "sdd probe",
        "Statistics of activations, gradients and weights, site by site, on given data, without an update.",
        "RUN|CHECKPOINT|PRESET [ANOTHER] [--placement NAME] [--data PATH] [OPTIONS]",
    )
    add = parser.add_argument
    about = "a run (its newest checkpoint), a checkpoint (RUN/checkpoints/step-...), or untrained weights: "
    about += ", ".join(model_presets) + " or a config.json; two stand side by side"
    add("subjects", metavar="RUN|CHECKPOINT|PRESET", nargs="+", help=about)
    add("--placement", action="append", default=[], help="of a preset; given twice, the two stand side by side")
    add("--data", metavar="PATH", help="as in sdd train (default: the training data of the run)")
    add("--batches", type=positive_int, default=1, help="of the run's batch size (default 1)")
    add("--json", action="store_true", help="print the numbers as JSON")
    return parser
