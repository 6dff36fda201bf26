"""What this project wants its benchmarks to show, and whether a result shows it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Widths for which shares of a copy are wanted.
WIDTHS = range(2048, 16384 + 1)


@dataclass(frozen=True)
class Target:
    """A wanted number.

    Attributes:
        measure: what it is.
        at_least: what must be reached.
        aim: what is hoped for.
        larger_is_better: a share; otherwise a ratio of times or bytes.
        values: finds what it is about in a result, by what it belongs to.
    """

    measure: str
    at_least: float
    aim: float
    larger_is_better: bool
    values: Callable[[Mapping[str, Any]], Iterator[tuple[str, float]]]

    @property
    def sign(self) -> str:
        """The relation between a value and what is wanted."""
        return ">=" if self.larger_is_better else "<="

    def reached(self, value: float) -> str:
        """`aim`, `at least` or `missed`."""
        for level, name in ((self.aim, "aim"), (self.at_least, "at least")):
            if value >= level if self.larger_is_better else value <= level:
                return name
        return "missed"


@dataclass(frozen=True)
class Finding:
    """A target and one number that a result has for it."""

    target: Target
    what: str
    value: float

    @property
    def reached(self) -> str:
        """`aim`, `at least` or `missed`."""
        return self.target.reached(self.value)


def check(result: Mapping[str, Any]) -> list[Finding]:
    """Every number of a result that a target is about; none if it is about another device or shape."""
    return [Finding(target, what, value) for target in TARGETS for what, value in target.values(result)]


def _is_h100(result: Mapping[str, Any]) -> bool:
    return "H100" in (result.get("machine", {}).get("gpu") or "")


def _shares(direction: str) -> Callable[[Mapping[str, Any]], Iterator[tuple[str, float]]]:
    """The lowest share of the copy of each operation over the widths."""

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
    """Numbers of a preset's whole steps against `prenorm-qk`, on an H100 or on a CPU."""

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


#: The wanted numbers.
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
