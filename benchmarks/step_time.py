"""A training step of each placement: time, tokens/s, peak memory and MFU; variants in turn in one process.

    ./dev bench step_time                                             # micro on this machine's CPU
    ./dev bench step_time --presets 581m,1b --context 4096 --layers 4 --batch 2 --device cuda --compile

A variant is a placement, by the fastest path that this machine has. `sdd+composed` is the same model as people would
compose it, every norm a module of its own after its Linear (`SDD_KERNELS=composed`, no norm left out). Ratios are
medians of the ratio to `prenorm-qk` in the same round.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from _record import write_result
from sdd import kernels
from sdd.config_io import find_placement
from sdd.errors import UserError
from sdd.models import LanguageModel, ModelConfig, model_presets
from sdd.models.flops import training_flops
from sdd.plan.gpus import find_gpu
from sdd.train import OptimConfig
from sdd.train.optim import build_optimizer, clip_gradients

BASELINE = "prenorm-qk"
VARIANTS = f"{BASELINE},olmo2,peri,sdd,sdd-released,sdd-paper,sdd+composed,sdd-paper+composed"


@dataclass
class Variant:
    """A model with its optimiser, and the path by which it runs."""

    name: str
    config: ModelConfig
    path: Literal["auto", "composed"]
    model: LanguageModel
    optimizer: torch.optim.Optimizer


def built(name: str, shape: ModelConfig, args: argparse.Namespace) -> Variant:
    placement, _, composed = name.partition("+")
    config = replace(shape, placement=find_placement(placement), eliminate_norms=not composed)
    torch.manual_seed(0)
    model = LanguageModel(config, args.device)
    if args.compile:
        model.compile()
    optimizer = build_optimizer(model, OptimConfig())
    return Variant(name, config, "composed" if composed else "auto", model, optimizer)


def step(variant: Variant, tokens: torch.Tensor, precision: torch.dtype | None) -> float:
    """Seconds of one step: forward, backward, clipping and AdamW."""
    device = tokens.device.type
    wait(device)
    began = time.perf_counter()
    with kernels.use(variant.path):
        with torch.autocast(device, precision, enabled=precision is not None):
            loss = variant.model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    clip_gradients(variant.model, 1.0)
    variant.optimizer.step()
    variant.optimizer.zero_grad()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Bytes at most, of a CUDA device; empty elsewhere."""
    found: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device == "cuda":
        found.append(torch.cuda.max_memory_allocated())


def memory(name: str, shape: ModelConfig, tokens: torch.Tensor, args: argparse.Namespace) -> int | None:
    """Peak bytes of a step of this variant alone."""
    variant = built(name, shape, args)
    step(variant, tokens, args.dtype)
    with peak_memory(args.device) as found:
        step(variant, tokens, args.dtype)
    del variant
    gc.collect()
    return found[0] if found else None


def measure(preset: str, args: argparse.Namespace) -> dict[str, object]:
    """All variants of a preset, in turn."""
    shape = model_presets[preset]
    shape = replace(shape, n_layers=args.layers or shape.n_layers, context=args.context or shape.context)
    tokens = torch.randint(0, shape.vocab_size, (args.batch, shape.context + 1), device=args.device)
    names = args.variants.split(",")
    peaks = {name: memory(name, shape, tokens, args) for name in names}
    variants = [built(name, shape, args) for name in names]
    for variant in variants:
        for _ in range(2):
            step(variant, tokens, args.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for variant in variants:
            seconds[variant.name].append(step(variant, tokens, args.dtype))
    return {
        "shape": {"n_layers": shape.n_layers, "context": shape.context, "batch": args.batch, "d_model": shape.d_model},
        "variants": {
            variant.name: summary(variant, seconds, peaks[variant.name], tokens, args) for variant in variants
        },
    }


def summary(
    variant: Variant, seconds: dict[str, list[float]], peak: int | None, tokens: torch.Tensor, args: argparse.Namespace
) -> dict[str, object]:
    own, base = seconds[variant.name], seconds[BASELINE]
    rate = tokens[:, 1:].numel() / statistics.median(own)
    peak_flops = find_gpu(args.gpu).peak("bfloat16" if args.dtype else "float32") if args.gpu else None
    return {
        "median_seconds": statistics.median(own),
        "ratio_to_baseline": statistics.median(mine / theirs for mine, theirs in zip(own, base, strict=True)),
        "tokens_per_second": rate,
        "mfu": rate * training_flops(variant.config).model / peak_flops if peak_flops else None,
        "peak_bytes": peak,
        "seconds": own,
    }


def main() -> None:
    """Measure and write benchmarks/results/step_time-DEVICE.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="micro")
    parser.add_argument("--variants", default=VARIANTS, help=f"the first is what others are compared with: {BASELINE}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, help="fewer blocks than the preset has: 1 is a block and the head")
    parser.add_argument("--context", type=int, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gpu", help="name for the MFU, as for sdd plan --gpu")
    args = parser.parse_args()
    if BASELINE not in args.variants.split(","):
        raise UserError(f"--variants must hold {BASELINE}, with which the others are compared")
    args.dtype = torch.bfloat16 if (args.precision or args.device) in ("bfloat16", "cuda") else None
    torch.set_num_threads(args.threads)
    found = {}
    for preset in args.presets.split(","):
        found[preset] = measure(preset, args)
        for name, row in found[preset]["variants"].items():
            peak = f", {row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] else ""
            print(
                f"{preset:6} {name:20} {1e3 * row['median_seconds']:9.1f} ms   {row['ratio_to_baseline']:.3f}"
                f"   {row['tokens_per_second']:12,.0f} tokens/s{peak}",
                flush=True,
            )
    name = f"step_time-{args.device}" + ("-compiled" if args.compile else "")
    what = "time of a training step, medians; ratios are medians over rounds of the ratio to the first variant"
    print(f"written to {write_result(name, {'what': what, 'compiled': args.compile, 'presets': found})}")


if __name__ == "__main__":
    main()
