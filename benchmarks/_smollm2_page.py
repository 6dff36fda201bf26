"""The page and the picture of `./dev bench smollm2`, from its result file alone."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdd.draw.panel import Line, Panel
from sdd.draw.style import PLACEMENT_STYLES, Style

STYLES = {
    "plain": Style("#808080", "", (5, 2)),
    "o+up": PLACEMENT_STYLES["sdd"],
    "all": PLACEMENT_STYLES["prenorm-qk"],
    "all-eps": PLACEMENT_STYLES["postnorm"],
}
#: What is wanted of a converted model after training: a gap of at most so many nats, or so much of it closed.
WITHIN, SHARE = 0.1, 0.5

Arms = Mapping[str, Mapping[str, Any]]


def recovered(arm: Mapping[str, Any]) -> float:
    """The share of the gap that calibration left which training closed."""
    return 1 - arm["gap_after"]["nats"] / arm["gap_before"]["nats"]


def bound(gap: Mapping[str, float]) -> float:
    """The upper end of a gap's 95% interval."""
    return gap["nats"] + 1.96 * gap["se"]


def verdict(arm: Mapping[str, Any]) -> str:
    """Whether an arm is within the bound, or has recovered enough."""
    share, most = recovered(arm), bound(arm["gap_after"])
    least = 1 - most / arm["gap_before"]["nats"]
    found = f"the gap is at most {most:.3f} nats (95%)"
    if most <= WITHIN:
        return f"**within {WITHIN:g} nats** of the unconverted model trained as long: {found}"
    found += f", and {share:.0%} of what calibration left open is recovered, at least {least:.0%} (95%)"
    outcome = f"not within {WITHIN:g} nats, but **half is recovered**" if share >= SHARE else "**missed**"
    return f"{outcome}: {found}"


def panels(result: Mapping[str, Any]) -> list[Panel]:
    """Loss on the tuning windows against steps, and the same less that of the unconverted model."""
    arms: Arms = result["arms"]
    curves = {name: dict(arm["curve"]) for name, arm in arms.items()}
    plain = curves["plain"]

    def line(name: str, points: Mapping[int, float]) -> Line:
        return Line(arms[name]["label"], np.array(list(points)), np.array(list(points.values())), STYLES[name])

    gaps = [
        line(name, {step: loss - plain[step] for step, loss in points.items() if step in plain})
        for name, points in curves.items()
        if name != "plain"
    ]
    losses = [line(name, points) for name, points in curves.items()]
    wanted = (WITHIN, f"{WITHIN:g} nats")
    return [
        Panel("loss", "nats a token", losses, against="step"),
        Panel("above the unconverted model", "nats a token", gaps, log=True, reference=wanted, against="step"),
    ]


def page(result: Mapping[str, Any]) -> str:
    """The Markdown page of a result file."""
    blocks = [*_head(result), *_result(result), *_tried(result), *_measured(result)]
    return "\n\n".join(blocks) + "\n"


def _head(result: Mapping[str, Any]) -> Iterator[str]:
    steps, windows = result["settings"]["steps"], result["settings"]["tuning_windows"]
    yield "# A pretrained model, converted in mid-run"
    yield _wrapped(
        f"SmolLM2-135M, [calibrated](calibrate.md) to SDD and trained on for {steps} steps, beside the unconverted "
        "model trained as long: the same batches in the same order, the same optimiser, the same search of the rate. "
        "Losses are in nats a token on held-out text of the classics. The original model has "
        f"{result['original']['loss']:.3f}."
    )
    yield "![Left: loss against steps. Right: how far each arm is above the unconverted model](images/smollm2.png)"
    yield _wrapped(
        f"*Loss on the {windows} windows by which the rate was chosen; right, the same less that of the unconverted "
        "model at the same step. The table below is from other windows.*"
    )


def _result(result: Mapping[str, Any]) -> Iterator[str]:
    steps, arms = result["settings"]["steps"], result["arms"]
    yield "## Result"
    after = f"after {steps} steps"
    head = ["converted", "layers", "share of parameters", "rate", "calibrated", after, "gap, calibrated"]
    rows = [_cells(name, arm) for name, arm in arms.items()]
    yield _table([*head, f"gap, {after}", "recovered"], rows)
    yield _wrapped(
        "The gap after calibration is to the original, that after training to the unconverted model trained as long. "
        "Both are means of paired differences, ± one standard error over windows. *Recovered* is the share of the "
        "first that training closed."
    )
    verdicts = [_wrapped(f"- {arm['label']}: {verdict(arm)}.", "  ") for name, arm in arms.items() if name != "plain"]
    yield "\n".join([f"Wanted: at most {WITHIN:g} nats, or at least {SHARE:.0%} recovered.", "", *verdicts])


def _tried(result: Mapping[str, Any]) -> Iterator[str]:
    arms, settings = result["arms"], result["settings"]
    rates = [f"{rate:g}" for rate in settings["rates"]]
    yield "## What was tried"
    yield _wrapped(
        f"Each arm tried {len(rates)} rates for {settings['tuning_steps']} steps and went on with the best. Loss on "
        "the tuning windows after these steps:"
    )
    searched = [name for name, arm in arms.items() if arm["tuned"].keys() == set(rates)]
    losses = [[arms[name]["label"], *(f"{arms[name]['tuned'][rate]:.3f}" for rate in rates)] for name in searched]
    yield _table(["converted", *rates], losses)
    ends = [arms[name]["label"] for name in searched if f"{arms[name]['rate']:g}" in (rates[0], rates[-1])]
    if ends:
        yield _wrapped(f"At an end of the search, so that a better rate may lie outside: {', '.join(ends)}.")
    if {"all", "all-eps"} <= arms.keys():
        gain = arms["all"]["after"] - arms["all-eps"]["after"]
        yield _wrapped(
            "*Falling eps*: it starts at 10 times the median mean square of each layer's outputs, where norms hardly "
            f"act, and falls by equal ratios to a thousandth at step {settings['decay_from']}, while alpha grows so "
            "that a token of median scale keeps its output. It has the rate found for all layers. Against a constant "
            f"eps of 1e-6 it ends {abs(gain):.3f} nats {'lower' if gain > 0 else 'higher'}."
        )
    if "all-eps" not in arms:
        yield _wrapped(
            "Not run: all layers with a large eps that falls while the model trains (`--arms all-eps`). Not tried: "
            "alphas at a rate of their own, and more tokens a step."
        )
    yield _wrapped("More sets of layers were calibrated without training: see LOG.md of the repository, 2026-11-28.")


def _measured(result: Mapping[str, Any]) -> Iterator[str]:
    settings, machine = result["settings"], result["machine"]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    yield "## How it was measured"
    points = [
        f"**Training:** AdamW (betas 0.9 and 0.95, no weight decay, gradients clipped at 1), {settings['batch']} x "
        f"{settings['length']} tokens a step, float32; {settings['warmup']} steps of warm-up, constant to step "
        f"{settings['decay_from']}, then linear to 0. All parameters train, the alphas at the common rate. No state of "
        "an optimiser came with the model, so every arm starts without one.",
        f"**Calibration:** {settings['calibration_windows']} x {settings['heldout_length']} tokens of the training "
        "part.",
        f"**Held out:** {result['heldout_tokens']:,} tokens in {settings['heldout_windows']} windows, evenly spaced "
        f"over the held-out tails of all documents; the tuning windows are {settings['tuning_windows']} others.",
        "**One seed, one model:** the instruct model, read from a 4-bit file: fit for testing conversion, not for "
        "quoting its quality.",
        f"**Machine:** {machine['cpu']}, one thread; {used}; {machine['date']}, revision {machine['revision']}.",
    ]
    yield "\n".join(_wrapped(f"- {point}", "  ") for point in points)
    yield "Written by `./dev bench smollm2` from `benchmarks/results/smollm2.json`."


def _cells(name: str, arm: Mapping[str, Any]) -> list[str]:
    cells = [arm["label"], str(arm["layers"]), f"{arm['share']:.0%}", f"{arm['rate']:g}"]
    cells += ["" if name == "plain" else f"{arm['before']:.3f}", f"{arm['after']:.3f}"]
    if name == "plain":
        return [*cells, "", "", ""]
    gaps = [f"{arm[key]['nats']:.3f} ± {arm[key]['se']:.3f}" for key in ("gap_before", "gap_after")]
    return [*cells, *gaps, f"{recovered(arm):.0%}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
