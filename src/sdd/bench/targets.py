"""The targets of the benchmarks, and whether a result reaches them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: The widths for which there are targets of a share of a copy.
WIDTHS = range(2048, 16384 + 1)


@dataclass(frozen=True)
class Target:
    """A number that a benchmark should reach.

    Attributes:
        measure: the measured quantity, in words.
        at_least: the value that is required.
        aim: the value that is hoped for.
        larger_is_better: True for a share, False for a ratio of times or bytes.
        values: yields the numbers of a result that the target is about, each with its operation or shape.
    """

    measure: str
    at_least: float
    aim: float
    larger_is_better: bool
    values: Callable[[Mapping[str, Any]], Iterator[tuple[str, float]]]

    @property
    def sign(self) -> str:
        """The relation of a value that reaches the target to the target."""
        return ">=" if self.larger_is_better else "<="

    def reached(self, value: float) -> str:
        """`aim`, `at least` or `missed`."""
        for level, name in ((self.aim, "aim"), (self.at_least, "at least")):
            if value >= level if self.larger_is_better else value <= level:
                return name
        return "missed"


@dataclass(frozen=True)
class TargetResult:
    """One number of a result for a target; `what` names its operation or shape."""

    target: Target
    what: str
    value: float

    @property
    def reached(self) -> str:
        """`aim`, `at least` or `missed`."""
        return self.target.reached(self.value)


def check(result: Mapping[str, Any]) -> list[TargetResult]:
    """The numbers of a result for each target; none for a target of another device or shape."""
    return [TargetResult(target, what, value) for target in TARGETS for what, value in target.values(result)]


def _is_h100(result: Mapping[str, Any]) -> bool:
    return "H100" in (result.get("machine", {}).get("gpu") or "")


def _shares(direction: str) -> Callable[[Mapping[str, Any]], Iterator[tuple[str, float]]]:
    """Yield for each operation its lowest share of the copy over the widths."""

    def values(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        rows = result.get("operations", [])
        if not _is_h100(result) or result.get("dtype") != "bfloat16":
            return
        for name in dict.fromkeys(row["operation"] for row in rows):
            speeds = [
                row["gb_per_second"]["triton"][direction] / result["copy"]
                for row in rows
                if row["operation"] == name
                and row["width"] in WIDTHS
                and direction in row["gb_per_second"].get("triton", {})
            ]
            if speeds:
                yield name, min(speeds)

    return values


def _on(
    preset: str, gpu: bool, number: Callable[[Mapping[str, Any]], Iterator[tuple[str, float | None]]]
) -> Callable[[Mapping[str, Any]], Iterator[tuple[str, float]]]:
    """Yield numbers of whole steps of a preset against `prenorm-qk`, on an H100 or on a CPU."""

    def values(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        fits = result.get("device") == ("cuda" if gpu else "cpu") and (_is_h100(result) or not gpu)
        for shape in result.get("shapes", []) if fits else []:
            wanted = {"preset": preset, "part": "step", "baseline": "prenorm-qk"}
            wanted |= {"precision": "bfloat16"} if gpu else {}
            if all(shape[key] == value for key, value in wanted.items()):
                yield from ((what, value) for what, value in number(shape) if value is not None)

    return values


def _compiled(key: str) -> Callable[[Mapping[str, Any]], Iterator[tuple[str, float | None]]]:
    def number(shape: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
        modes = shape["variants"].get("sdd", {}).get("modes", {})
        yield _shape_text(shape), modes.get("compiled", {}).get(key)

    return number


def _composed(shape: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, modes in shape["composed_over_ours"].items():
        yield f"{name}, {_shape_text(shape)}", modes.get("compiled")


def _best(shape: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield _shape_text(shape), shape["variants"].get("sdd", {}).get("best_ratio")


def _shape_text(shape: Mapping[str, Any]) -> str:
    return f"{shape['n_layers']} blocks, {shape['batch']} x {shape['context']} tokens"


#: All targets.
TARGETS = (
    Target("H100, bfloat16: fused forward / copy, widths 2048 to 16384", 0.80, 0.90, True, _shares("forward")),
    Target("H100, bfloat16: fused backward / copy, widths 2048 to 16384", 0.75, 0.85, True, _shares("backward")),
    Target("H100, 1b, compiled: step of sdd / prenorm-qk", 1.03, 1.01, False, _on("1b", True, _compiled("ratio"))),
    Target("H100, 1b, compiled: Linear + RMSNorm composed / ours", 1.05, 1.10, True, _on("1b", True, _composed)),
    Target(
        "H100, 1b, compiled: peak memory of sdd / prenorm-qk",
        1.02,
        1.00,
        False,
        _on("1b", True, _compiled("peak_ratio")),
    ),
    Target("CPU, micro, best mode of each: step of sdd / prenorm-qk", 1.05, 1.02, False, _on("micro", False, _best)),
)
