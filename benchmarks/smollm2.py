"""Convert pretrained SmolLM2-135M, train it on, and compare with the unconverted model trained as long.

    ./dev bench smollm2 MODEL --work FOLDER                     # all arms, about an hour of one core
    ./dev bench smollm2 MODEL --work FOLDER --arms plain o+up   # some; FOLDER keeps what is done, and goes on with it
    ./dev bench smollm2 --page                                  # page and picture anew, from the result file

MODEL is a folder that `save_pretrained` wrote of model and tokenizer. All arms get the same batches in the same order.
Each tries every rate for some steps, and goes on with the one that is best on the tuning windows. The result is
benchmarks/results/smollm2.json, its page docs/smollm2.md with docs/images/smollm2.png.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _healing import ARMS, Data, Run, Settings, layers, load, paired, token_losses
from _record import RESULTS
from _smollm2_page import page, panels
from _tiny_models import versions
from sdd.bench.record import Record
from sdd.draw.curves import draw, save_figure
from sdd.errors import UserError
from sdd.files import aside, finite, read_json_object, write_aside

NAME = "smollm2"
DOCS = Path(__file__).resolve().parent.parent / "docs"
WHAT = (
    "SmolLM2-135M converted by calibration and trained on, beside the unconverted model trained on the same batches: "
    "held-out loss in nats a token; gaps are paired by windows, se their standard errors over windows"
)


def main() -> None:
    """Train the arms that are missing; write result, page and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder with model and tokenizer")
    parser.add_argument("--work", type=Path, help="folder of the runs, a few GB while they go on")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--page", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.page and (args.model is None or args.work is None):
        parser.error("give the folder of SmolLM2-135M and --work FOLDER, or --page")
    try:
        result = _committed() if args.page else measured(args)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    save_figure(draw(panels(result), columns=2), DOCS / "images" / NAME)
    write_aside(DOCS / f"{NAME}.md", page(result))
    print(f"written to {RESULTS / NAME}.json and {DOCS / NAME}.md")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train the arms, and write the result of all that are done."""
    torch.set_num_threads(1)
    settings, model = Settings(), load(args.model)
    data = Data(args.model, settings)
    original = _original(args.work, model, data)
    counts = {name: (len(found := layers(model, arm)), sum(map(_size, found))) for name, arm in ARMS.items()}
    total = sum(map(_size, [model]))
    del model
    for name in args.arms:
        train(args.work, args.model, name, data, settings)
    done = {name: runs for name in ARMS if (runs := finished(args.work, args.model, name, data, settings))}
    if "plain" not in done:
        raise UserError("the arm plain is missing, with which the others are compared: --arms plain")
    values = {
        "what": WHAT,
        "versions": {name: version for name, version in versions().items() if name in ("torch", "transformers")},
        "settings": asdict(settings),
        "heldout_tokens": int(original.size),
        "original": {"loss": _mean(original)},
        "arms": {
            name: {
                "label": ARMS[name].label,
                "layers": counts[name][0],
                "share": round(counts[name][1] / total, 3),
                **summary(runs, original, _ended(done["plain"]), settings),
            }
            for name, runs in done.items()
        },
    }
    record = Record(NAME, RESULTS, values)
    record.save()
    return record.content


def train(work: Path, folder: Path, name: str, data: Data, settings: Settings) -> None:
    """Try the rates of an arm for a few steps each, and go on with the best."""
    runs = _runs(work, folder, name, data, settings)
    for run in runs if len(runs) > 1 else []:
        run.to(settings.tuning_steps, _say)
        run.close()
    chosen = min(runs, key=lambda run: run.tuned)
    for run in runs:
        if run is not chosen:
            run.close(forget=True)
    _say(f"{name}: goes on at {chosen.rate:g}")
    chosen.to(settings.steps, _say)
    chosen.close()


def finished(work: Path, folder: Path, name: str, data: Data, settings: Settings) -> list[Run]:
    """The runs of an arm, the one with all steps first; none if there is none."""
    runs = sorted(_runs(work, folder, name, data, settings), key=lambda run: -run.values["steps"])
    return runs if runs and runs[0].values["steps"] == settings.steps else []


def _runs(work: Path, folder: Path, name: str, data: Data, settings: Settings) -> list[Run]:
    rates: Sequence[float] = settings.rates
    if other := ARMS[name].rate_of:
        found = finished(work, folder, other, data, settings)
        rates = [run.rate for run in found[:1]]
    return [Run(work, folder, name, rate, data, settings) for rate in rates]


def summary(runs: Sequence[Run], original: np.ndarray, plain: np.ndarray, settings: Settings) -> dict[str, Any]:
    """The numbers of an arm.

    Args:
        runs: the whole one first.
        original: held-out losses of the unconverted, untrained model.
        plain: those of the unconverted model after the same steps.
        settings: of the study.
    """
    run, before, after = runs[0], runs[0].losses(0), _ended(runs)
    gaps = {"gap_before": paired(before, original), "gap_after": paired(after, plain)}
    return {
        "rate": run.rate,
        "tuned": {f"{each.rate:g}": finite(each.tuned) for each in sorted(runs, key=lambda each: each.rate)},
        "before": _mean(before),
        "after": _mean(after),
        **{key: {"nats": round(gap, 4), "se": round(se, 4)} for key, (gap, se) in gaps.items()},
        "curve": run.values["curve"],
        "cpu_seconds_a_step": round(run.values["cpu_seconds"] / settings.steps, 2),
    }


def _committed() -> dict[str, Any]:
    path = RESULTS / f"{NAME}.json"
    result = read_json_object(path)
    if "arms" not in result:
        raise UserError(f"{path}: no result to write a page from: train first, with MODEL and --work FOLDER")
    return result


def _original(work: Path, model: Any, data: Data) -> np.ndarray:
    """The held-out losses of the untouched model, kept with the runs."""
    path = work / "plain-heldout-0.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        with aside(path) as temporary, temporary.open("wb") as file:
            np.save(file, token_losses(model, data.heldout))
    return np.load(path)


def _ended(runs: Sequence[Run]) -> np.ndarray:
    return runs[0].losses(runs[0].settings.steps)


def _mean(losses: np.ndarray) -> float:
    return round(float(losses.mean()), 4)


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
