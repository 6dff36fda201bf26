"""Training steps of lean blocks over those of the equations, on a CPU, in turn: whether leaving norms out pays there.

Both compute the same function (`sdd.models.lean`). On a CPU models run the equations unless this says otherwise.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from _record import write_result
from sdd.models import LanguageModel, ModelConfig, model_presets
from sdd.placement import placements
from sdd.train import OptimConfig
from sdd.train.optim import build_optimizer, clip_gradients

UNTIMED = 3


class Steps:
    """Training steps of one model, timed: forward, backward, clipping, AdamW."""

    def __init__(self, config: ModelConfig, batch_size: int, lean: bool) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(config)
        for block in self.model.blocks:
            setattr(block, "force_lean", lean)  # noqa: B010
        self.optimizer = build_optimizer(self.model, OptimConfig())
        self.tokens = torch.randint(config.vocab_size, (batch_size, config.context + 1))

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.model(self.tokens[:, :-1], self.tokens[:, 1:], detailed=True).total.backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def compare(config: ModelConfig, batch_size: int, rounds: int) -> dict[str, float]:
    """Median seconds of both, and the median and quartiles of their ratio within a round."""
    steps = {name: Steps(config, batch_size, name == "lean") for name in ("equations", "lean")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(UNTIMED + rounds):
        for name in sorted(steps, reverse=bool(index % 2)):  # neither is always the first
            seconds[name].append(steps[name].step())
    equations, lean = (seconds[name][UNTIMED:] for name in ("equations", "lean"))
    ratios = [ours / theirs for ours, theirs in zip(lean, equations, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "equations_seconds": statistics.median(equations),
        "lean_seconds": statistics.median(lean),
        "median_ratio": statistics.median(ratios),
        "lower_quartile": low,
        "upper_quartile": high,
    }


def main() -> None:
    """Measure and write benchmarks/results/lean_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--presets", nargs="+", default=["nano", "micro"])
    parser.add_argument("--placements", nargs="+", default=["sdd", "sdd-paper", "sdd-released", "sdd-prenorm"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for preset in args.presets:
        for placement in args.placements:
            config = replace(model_presets[preset], placement=placements[placement])
            found = compare(config, 4, args.rounds)
            results[f"{preset}, {placement}"] = found
            quartiles = f"quartiles {found['lower_quartile']:.3f}, {found['upper_quartile']:.3f}"
            print(f"{preset}, {placement}: {found['median_ratio']:.3f} ({quartiles})", flush=True)
    file = write_result(
        "lean_cpu",
        {
            "what": "seconds of training steps of lean blocks over those of the equations, in turn in one process",
            "rounds": args.rounds,
            "threads": args.threads,
            "results": results,
        },
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
