"""`sdd bench step-time`: a training step of each placement, eager and compiled, variants in turn in one process.

A step is forward and backward pass, clipping and AdamW; of one block alone, forward and backward pass. Ratios are
medians over rounds of the ratio to the first variant in the same round: of the same mode, and of each one's best mode.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdd.bench.profile import kernel_names, times_of
from sdd.bench.record import Record
from sdd.bench.timing import Ticker, free, quartiles, ratios, turned
from sdd.bench.variants import COMPOSED, Mode, Setting, Variant, build
from sdd.plan.gpus import Gpu

#: What is compared unless asked otherwise; the first is what the others are compared with.
VARIANTS = ("prenorm-qk", "olmo2", "peri", "sdd", "sdd-released", "sdd-paper", "sdd+composed", "sdd-paper+composed")


@dataclass
class Plan:
    """What is measured at one shape.

    Attributes:
        preset: its name.
        setting: the shape and where it runs.
        names: of the variants, the first is the baseline.
        modes: eager, compiled or both.
        rounds: turns of each.
        gpu: whose peak MFU is a share of; None for no MFU.
        profile: find out where the time goes, too.
    """

    preset: str
    setting: Setting
    names: list[str]
    modes: list[Mode]
    rounds: int
    gpu: Gpu | None
    profile: bool

    @property
    def title(self) -> str:
        """The preset and what of it."""
        return f"{self.preset}, one block" if self.setting.block else self.preset


def measure(plans: list[Plan], record: Record) -> None:
    """Fill `shapes` of the record, one entry a shape, saving it after every round."""
    turns = sum(len(plan.names) * len(plan.modes) * (plan.rounds + 1) for plan in plans)
    record.values["shapes"] = []
    with Ticker(turns) as ticker:
        for plan in plans:
            measure_one(plan, record, ticker)
            free(plan.setting.device)


def heading(plan: Plan) -> dict[str, Any]:
    """What stands above a shape's numbers."""
    setting = plan.setting
    return {
        "preset": plan.preset,
        "part": "block" if setting.block else "step",
        "n_layers": 1 if setting.block else setting.shape.n_layers,
        "d_model": setting.shape.d_model,
        "context": setting.shape.context,
        "batch": setting.batch,
        "precision": str(setting.dtype or torch.float32).removeprefix("torch."),
        "baseline": plan.names[0],
        "mfu_of": plan.gpu.name if plan.gpu else None,
        "rounds": 0,
    }


def measure_one(plan: Plan, record: Record, ticker: Ticker) -> None:
    """Warm up, then take turns; what is there after each round is in the file."""
    device, entry = plan.setting.device, heading(plan)
    torch._dynamo.reset()
    # each variant is one more version of the same code; past the limit torch would quietly run them eagerly
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True), kernel_names(plan.profile):
        variants = build(plan.setting, plan.names, plan.modes)
        for variant in variants:
            ticker.at(f"{plan.title}: {variant.name}, {variant.mode}: warming up")
            variant.warm_up(device)
            ticker.tick()
        for index in range(plan.rounds):
            for variant in turned(variants, index):
                ticker.at(f"{plan.title}: {variant.name}, {variant.mode}")
                variant.turn(device)
                ticker.tick()
            entry |= {"rounds": index + 1, **summary(plan, variants)}
            if index == 0:
                record.values["shapes"].append(entry)
            record.save()
        if plan.profile:
            ticker.at(f"{plan.title}: profile")
            entry["profile"] = profile(variants, device)
            record.save()


def summary(plan: Plan, variants: list[Variant]) -> dict[str, Any]:
    """The medians of the rounds so far, by variant, and how much slower compositions are than ours."""
    by_name: dict[str, dict[Mode, Variant]] = {}
    for one in variants:
        by_name.setdefault(one.name, {})[one.mode] = one
    base = by_name[plan.names[0]]
    found: dict[str, Any] = {"variants": {}}
    for name, modes in by_name.items():
        entry: dict[str, Any] = {mode: numbers(plan, one, base[mode]) for mode, one in modes.items()}
        found["variants"][name] = {**best(modes, base), "modes": entry}
    found["composed_over_ours"] = {
        name: {mode: ratio(one, by_name[name][mode]) for mode, one in by_name[f"{name}+{COMPOSED}"].items()}
        for name in plan.names
        if f"{name}+{COMPOSED}" in by_name
    }
    return found


def numbers(plan: Plan, one: Variant, base: Variant) -> dict[str, Any]:
    """Of one variant in one mode."""
    if one.failed:
        return {"failed": one.failed}
    median = statistics.median(one.seconds)
    rate = plan.setting.tokens / median
    peak_flops = plan.gpu.peak("bfloat16" if plan.setting.dtype else "float32") if plan.gpu else None
    return {
        "median_seconds": median,
        "ratio": ratio(one, base),
        "ratio_quartiles": None if base.failed else quartiles(ratios(one.seconds, base.seconds)),
        "tokens_per_second": rate,
        "mfu": rate * one.flops / peak_flops if peak_flops else None,
        "peak_bytes": one.peak_bytes,
        "peak_ratio": one.peak_bytes / base.peak_bytes if one.peak_bytes and base.peak_bytes else None,
        "seconds": one.seconds.copy(),
    }


def best(modes: Mapping[Mode, Variant], base: Mapping[Mode, Variant]) -> dict[str, Any]:
    """The mode in which a variant is fastest, and the ratio to the baseline's fastest."""
    own, theirs = fastest(modes), fastest(base)
    return {
        "best": own.mode if own else None,
        "best_ratio": ratio(own, theirs) if own and theirs else None,
        "best_ratio_quartiles": quartiles(ratios(own.seconds, theirs.seconds)) if own and theirs else None,
    }


def fastest(modes: Mapping[Mode, Variant]) -> Variant | None:
    """By the median; None if all failed."""
    alive = [one for one in modes.values() if not one.failed]
    return min(alive, key=lambda one: statistics.median(one.seconds), default=None)


def ratio(own: Variant, base: Variant) -> float | None:
    """The median over rounds, None if one of them has no times."""
    return None if own.failed or base.failed else statistics.median(ratios(own.seconds, base.seconds))


def profile(variants: list[Variant], device: torch.device) -> dict[str, dict[str, Any]]:
    """Where the time of a step goes, by variant and mode: `times_of` each."""
    found: dict[str, dict[str, Any]] = {}
    for one in variants:

        def look(one: Variant = one) -> None:
            found.setdefault(one.name, {})[one.mode] = times_of(one.run, device)

        one.attempt(look, device)
    return found
