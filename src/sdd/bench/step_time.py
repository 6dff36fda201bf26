"""`sdd bench step-time`: a training step of each placement, eager and compiled, variants in turn in one process.

A step is forward and backward pass, clipping and AdamW; of one block alone, forward and backward pass. Ratios are
medians over rounds of the ratio to the first variant in the same round: of the same mode, and of each one's best mode.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdd.bench.record import Record
from sdd.bench.timing import Ticker, free, kernel_names, quartiles, ratios, times_of, turned
from sdd.bench.variants import COMPOSED, Mode, Setting, Variant, build
from sdd.plan.gpus import Gpu

#: The default variants; the others are compared with the first.
VARIANTS = ("prenorm-qk", "olmo2", "peri", "sdd", "sdd-released", "sdd-paper", "sdd+composed", "sdd-paper+composed")


@dataclass
class StepTimeSettings:
    """The measurements at one shape.

    Attributes:
        preset: name of the preset.
        setting: the shape, and the device that runs it.
        names: names of the variants; the first is the baseline.
        modes: eager, compiled or both.
        rounds: turns of each variant.
        gpu: the GPU whose peak MFU refers to; None for no MFU.
        profile: whether to profile a step of each variant too.
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
        """The preset, and whether one block of it is measured."""
        return f"{self.preset}, one block" if self.setting.block else self.preset


def measure(shapes: list[StepTimeSettings], record: Record) -> None:
    """Fill `shapes` of the record, one entry for each shape, and save it after every round."""
    turns = sum(len(shape.names) * len(shape.modes) * (shape.rounds + 1) for shape in shapes)
    record.values["shapes"] = []
    with Ticker(turns) as ticker:
        for settings in shapes:
            measure_one(settings, record, ticker)
            free(settings.setting.device)


def heading(settings: StepTimeSettings) -> dict[str, Any]:
    """The description of a shape in the result, above its numbers."""
    setting = settings.setting
    return {
        "preset": settings.preset,
        "part": "block" if setting.block else "step",
        "n_layers": 1 if setting.block else setting.shape.n_layers,
        "d_model": setting.shape.d_model,
        "context": setting.shape.context,
        "batch": setting.batch,
        "precision": str(setting.dtype or torch.float32).removeprefix("torch."),
        "baseline": settings.names[0],
        "mfu_of": settings.gpu.name if settings.gpu else None,
        "rounds": 0,
    }


def measure_one(settings: StepTimeSettings, record: Record, ticker: Ticker) -> None:
    """Warm up, then take turns; the file holds the rounds so far after each of them."""
    device, entry = settings.setting.device, heading(settings)
    torch._dynamo.reset()
    # each variant is one more version of the same code, and past its limit torch would quietly run it eagerly
    with (
        torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
        kernel_names(settings.profile),
    ):
        variants = build(settings.setting, settings.names, settings.modes)
        for variant in variants:
            ticker.at(f"{settings.title}: {variant.name}, {variant.mode}: warming up")
            variant.warm_up(device)
            ticker.tick()
        for index in range(settings.rounds):
            for variant in turned(variants, index):
                ticker.at(f"{settings.title}: {variant.name}, {variant.mode}")
                variant.turn(device)
                ticker.tick()
            entry |= {"rounds": index + 1, **summary(settings, variants)}
            if index == 0:
                record.values["shapes"].append(entry)
            record.save()
        if settings.profile:
            ticker.at(f"{settings.title}: profile")
            entry["profile"] = profile(variants, device)
            record.save()


def summary(settings: StepTimeSettings, variants: list[Variant]) -> dict[str, Any]:
    """The medians of the rounds so far by variant, and the ratios of compositions to our own models."""
    by_name: dict[str, dict[Mode, Variant]] = {}
    for one in variants:
        by_name.setdefault(one.name, {})[one.mode] = one
    base = by_name[settings.names[0]]
    found: dict[str, Any] = {"variants": {}}
    for name, modes in by_name.items():
        entry: dict[str, Any] = {mode: numbers(settings, one, base[mode]) for mode, one in modes.items()}
        found["variants"][name] = {**best(modes, base), "modes": entry}
    found["composed_over_ours"] = {
        name: {mode: ratio(one, by_name[name][mode]) for mode, one in by_name[f"{name}+{COMPOSED}"].items()}
        for name in settings.names
        if f"{name}+{COMPOSED}" in by_name
    }
    return found


def numbers(settings: StepTimeSettings, one: Variant, base: Variant) -> dict[str, Any]:
    """The numbers of one variant in one mode."""
    if one.failed:
        return {"failed": one.failed}
    median = statistics.median(one.seconds)
    rate = settings.setting.tokens / median
    peak_flops = settings.gpu.peak("bfloat16" if settings.setting.dtype else "float32") if settings.gpu else None
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
    """The fastest mode of a variant, and its ratio to the fastest mode of the baseline."""
    own, theirs = fastest(modes), fastest(base)
    return {
        "best": own.mode if own else None,
        "best_ratio": ratio(own, theirs) if own and theirs else None,
        "best_ratio_quartiles": quartiles(ratios(own.seconds, theirs.seconds)) if own and theirs else None,
    }


def fastest(modes: Mapping[Mode, Variant]) -> Variant | None:
    """The fastest mode by the median; None if all failed."""
    alive = [one for one in modes.values() if not one.failed]
    return min(alive, key=lambda one: statistics.median(one.seconds), default=None)


def ratio(own: Variant, base: Variant) -> float | None:
    """The median ratio over rounds; None if one of the two has no times."""
    return None if own.failed or base.failed else statistics.median(ratios(own.seconds, base.seconds))


def profile(variants: list[Variant], device: torch.device) -> dict[str, dict[str, Any]]:
    """`times_of` a step, by variant and mode."""
    found: dict[str, dict[str, Any]] = {}
    for one in variants:

        def look(one: Variant = one) -> None:
            found.setdefault(one.name, {})[one.mode] = times_of(one.run, device)

        one.attempt(look, device)
    return found
