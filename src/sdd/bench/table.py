"""Results of benchmarks as aligned text."""

from collections.abc import Mapping
from typing import Any

from sdd.bench.targets import check
from sdd.bench.timing import differences
from sdd.terminal import aligned, indented

#: The number of operations that a profile shows.
SHOWN = 10


def kernels_table(values: Mapping[str, Any]) -> list[str]:
    """One line for each operation and width: the shares of the copy, forward and backward, of every variant."""
    names = list(dict.fromkeys(name for row in values["operations"] for name in row["gb_per_second"]))
    rows = [
        [row["operation"], row["width"], *(_shares(row["gb_per_second"].get(name), values["copy"]) for name in names)]
        for row in values["operations"]
    ]
    return [
        f"copy {values['copy']:,.1f} GB/s; shares of it, forward and backward, {values['dtype']}",
        *aligned([["operation", "width", *names], *rows], right=range(1, 2 + len(names))),
    ]


def _shares(speed: Mapping[str, Any] | None, copy: float) -> str:
    if speed is None:
        return "-"
    return speed.get("failed") or f"{speed['forward'] / copy:.0%} {speed['backward'] / copy:4.0%}"


def small_table(values: Mapping[str, Any]) -> list[str]:
    """One line for each size: microseconds of every variant, and the ratio of the first to the second."""
    names = list(values["small"][0]["microseconds"])
    rows = []
    for row in values["small"]:
        times = [row["microseconds"][name] for name in names]
        rows.append([row["rows"], row["width"], *(f"{time:,.0f}" for time in times), f"{times[0] / times[1]:.2f}"])
    heading = ["rows", "width", *names, f"{names[0]} / {names[1]}"]
    return [
        "norm, forward and backward, microseconds of a whole eager call",
        *aligned([heading, *rows], right=range(len(heading))),
    ]


def step_time_table(values: Mapping[str, Any]) -> list[str]:
    """A table for each shape, and its profile if it has one."""
    lines: list[str] = []
    for shape in values["shapes"]:
        lines += [*_shape_lines(shape), *_composed_lines(shape), *_profile_lines(shape), ""]
    return lines


def _shape_lines(shape: Mapping[str, Any]) -> list[str]:
    heading = ["variant", "mode", "ms", "ratio", "quartiles", "tokens/s", "MFU", "peak MiB", "ratio"]
    rows = []
    for name, variant in shape["variants"].items():
        rows += [[name, *_cells(mode, one, variant["best"])] for mode, one in variant["modes"].items()]
        if len(variant["modes"]) > 1 and variant["best_ratio"] is not None:
            low, high = variant["best_ratio_quartiles"]
            rows.append([name, "best", "", f"{variant['best_ratio']:.3f}", f"{low:.3f} {high:.3f}", *[""] * 4])
    part = "one block" if shape["part"] == "block" else f"{shape['n_layers']} blocks"
    title = f"{shape['preset']}, {part}, {shape['batch']} x {shape['context']} tokens, {shape['precision']}"
    about = f"medians of {shape['rounds']} rounds; ratios to {shape['baseline']} in the same round; * the faster mode"
    return [title, about, *aligned([heading, *rows], right=range(2, 9))]


def _cells(mode: str, one: Mapping[str, Any], best: str | None) -> list[str]:
    if "failed" in one:
        return [mode, one["failed"], *[""] * 6]
    low, high = one["ratio_quartiles"] or (None, None)
    return [
        mode + (" *" if mode == best else ""),
        f"{1e3 * one['median_seconds']:,.2f}",
        _fixed(one["ratio"]),
        f"{_fixed(low)} {_fixed(high)}",
        f"{one['tokens_per_second']:,.0f}",
        "-" if one["mfu"] is None else f"{one['mfu']:.1%}",
        "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:,.1f}",
        _fixed(one["peak_ratio"]),
    ]


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _composed_lines(shape: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, modes in shape["composed_over_ours"].items():
        found = ", ".join(f"{mode} {_fixed(value)}" for mode, value in modes.items())
        lines.append(f"Linear + RMSNorm composed / ours, {name}: {found}")
    return lines


def _profile_lines(shape: Mapping[str, Any]) -> list[str]:
    """The time that each variant spends more, or less, than the baseline in the same mode, by operation."""
    lines: list[str] = []
    profile = shape.get("profile", {})
    base = profile.get(shape["baseline"], {})
    for name, modes in profile.items():
        for mode, own in modes.items():
            if name == shape["baseline"] or mode not in base:
                continue
            lines.append(f"ms a step more than {shape['baseline']}, {name}, {mode}")
            rows = list(differences(own, base[mode]).items())[:SHOWN]
            lines += indented(aligned([(f"{more:+.3f}", operation[:100]) for operation, more in rows], right=(0,)))
    return lines


def target_lines(result: Mapping[str, Any]) -> list[str]:
    """One line for each target that the result has a number for, and whether it is reached."""
    return [
        f"{one.target.measure} ({one.what}): {one.value:.3f}, wanted {one.target.sign} {one.target.at_least:g}, "
        f"aim {one.target.aim:g}: {one.reached}"
        for one in check(result)
    ]
