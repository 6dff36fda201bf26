"""Training tokens/s of `moe-nano` over a dense model with as many active parameters, on a CPU, steps in turn."""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from _record import write_result
from sdd.models import LanguageModel, ModelConfig, count_parameters, model_presets
from sdd.train import OptimConfig
from sdd.train.config_io import find_placement
from sdd.train.optim import build_optimizer, clip_gradients

MODELS = {"dense": model_presets["nano"], "moe": model_presets["moe-nano"]}
UNTIMED = 3


class Run:
    """A model that takes training steps: forward, backward, clipping, AdamW."""

    def __init__(self, config: ModelConfig, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(config)
        self.optimizer = build_optimizer(self.model, OptimConfig())
        self.tokens = torch.randint(config.vocab_size, (batch_size, config.context + 1))

    def step(self) -> float:
        """Take a step; tokens a second."""
        began = time.perf_counter()
        self.model(self.tokens[:, :-1], self.tokens[:, 1:], detailed=True).total.backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.tokens[:, 1:].numel() / (time.perf_counter() - began)


def compare(placement: str, batch_size: int, rounds: int) -> dict[str, float]:
    """Medians of both, and of the ratios within a round."""
    configs = {name: replace(config, placement=find_placement(placement)) for name, config in MODELS.items()}
    runs = {name: Run(config, batch_size) for name, config in configs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(UNTIMED + rounds):
        for name in sorted(runs, reverse=bool(index % 2)):  # neither is always the first
            found[name].append(runs[name].step())
    dense, moe = (found[name][UNTIMED:] for name in ("dense", "moe"))
    ratios = [ours / theirs for ours, theirs in zip(moe, dense, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "dense_tokens_per_second": statistics.median(dense),
        "moe_tokens_per_second": statistics.median(moe),
        "median_ratio": statistics.median(ratios),
        "lower_quartile": low,
        "upper_quartile": high,
    }


def main() -> None:
    """Measure and write benchmarks/results/moe_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--placements", nargs="+", default=["sdd", "sdd-paper", "prenorm-qk"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for placement in args.placements:
        for batch_size in args.batch_sizes:
            name = f"{placement}, batch of {batch_size}"
            results[name] = found = compare(placement, batch_size, args.rounds)
            quartiles = f"quartiles {found['lower_quartile']:.3f}, {found['upper_quartile']:.3f}"
            print(f"{name}: {found['median_ratio']:.3f} ({quartiles})", flush=True)
    file = write_result(
        "moe_speed",
        {
            "what": "tokens/s of training steps of moe-nano over those of nano, in turn in one process",
            "active_parameters": {name: count_parameters(config).published_active for name, config in MODELS.items()},
            "rounds": args.rounds,
            "results": results,
        },
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
