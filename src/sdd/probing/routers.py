"""Experts that get no tokens and routers that saturate, from the `routing` of metrics.jsonl."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sdd.probing.checks import Finding, Kind
from sdd.probing.rows import number

#: Steps between two looks.
LOOK = 16
#: Steps in a row. While the learning rate warms up, blocks of healthy `moe-nano` runs are without some expert for up to
#: 80 steps, until the load balancing loss has its effect; a batch of few tokens leaves one out now and then.
DEAD_STEPS = 128
#: Of the highest entropy so far, and steps in a row. Below, one expert has nearly all weight whatever k is, and the
#: gradient that could change the choice is gone. Healthy `moe-nano` runs stay above 40%.
ENTROPY_SHARE, SATURATED_STEPS = 0.05, 32

_STEPS: Mapping[Kind, int] = {"dead experts": DEAD_STEPS, "saturated router": SATURATED_STEPS}


class Routers:
    """For how many steps in a row each block's router has left experts out, or has had next to no entropy."""

    def __init__(self) -> None:
        self._steps = 0
        self._highest: dict[int, float] = {}
        self._streaks: dict[tuple[Kind, int], tuple[int, int]] = {}  # its first step and how many it has

    def update(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        """The findings of one row of metrics.jsonl; none between looks, nor of a dense model."""
        routing = row.get("routing")
        if not isinstance(routing, Mapping):
            return
        self._steps += 1
        step = int(row["step"])
        for layer, dead in enumerate(map(number, routing.get("dead_experts", ()))):
            yield from self._see("dead experts", layer, step, dead, f"experts without tokens: {dead:g}")
        for layer, entropy in enumerate(map(number, routing.get("entropy", ()))):
            highest = self._highest[layer] = max(entropy, self._highest.get(layer, 0.0))
            threshold = ENTROPY_SHARE * highest
            factor = threshold / entropy if entropy else math.inf if threshold else 0.0  # 0 of a single expert
            what = f"entropy {entropy:.2g} nats ({highest:.3g} at its highest)"
            yield from self._see("saturated router", layer, step, factor, what)

    @property
    def looks(self) -> bool:
        """Whether the last step was one at which findings are made."""
        return self._steps > 0 and self._steps % LOOK == 0

    def _see(self, kind: Kind, layer: int, step: int, factor: float, what: str) -> Iterator[Finding]:
        since, count = self._streaks.get((kind, layer), (step, 0))
        self._streaks[kind, layer] = (since, count + 1)
        if not factor >= 1:
            del self._streaks[kind, layer]
        elif self.looks and count + 1 >= _STEPS[kind]:
            lasting = f"{what} at step {step}, and so for {count + 1} steps"
            yield Finding(kind, f"blocks.{layer}.ffn.router", factor, lasting, since)
