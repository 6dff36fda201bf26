"""Training steps of several models, timed in turn in one process."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from sdd.models import LanguageModel
from sdd.train import OptimConfig
from sdd.train.optim import build_optimizer, clip_gradients

UNTIMED = 3


class Steps:
    """Training steps of a model on one drawn batch: forward, backward, clipping, AdamW."""

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, OptimConfig())
        self.tokens = torch.randint(model.config.vocab_size, (batch_size, model.config.context + 1))

    def seconds(self) -> float:
        """Take a step; its seconds."""
        began = time.perf_counter()
        self.model(self.tokens[:, :-1], self.tokens[:, 1:], detailed=True).total.backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def in_turn(steps: Mapping[str, Steps], rounds: int) -> dict[str, list[float]]:
    """Seconds of each model's step in each round; the order is reversed from round to round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(UNTIMED + rounds):
        for name in sorted(steps, reverse=bool(index % 2)):
            found[name].append(steps[name].seconds())
    return {name: seconds[UNTIMED:] for name, seconds in found.items()}


def ratio_summary(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within a round."""
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"median_ratio": statistics.median(ratios), "lower_quartile": low, "upper_quartile": high}
