"""Decode latency and prefill speed of placements, with and without a KV cache, variants in turn in one process.

    ./dev bench decode_latency                               # nano and micro on a CPU
    ./dev bench decode_latency --device cuda --presets 581m  # bfloat16 by autocast

Weights are as drawn: no time depends on their values. Tokens are the most likely ones: nothing is sorted or drawn.
Prefill is the time to the first token. Without a cache every token reads the whole window, so only the first few after
the prompt are timed. Placements take turns, each round beginning with another one.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from _record import write_result
from sdd import placements
from sdd.models import LanguageModel, generate_stream, model_presets
from sdd.train.parallel import pick_autocast

PLACEMENTS = ("prenorm", "prenorm-qk", "sdd", "sdd-paper")
BASE = "prenorm"
UNCACHED_TOKENS = 8


def main() -> None:
    """Measure and write benchmarks/results/decode_latency.json (with -cuda on a GPU)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "micro"], choices=list(model_presets))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=1, help="rows decoded at once")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt (default: half of the context)")
    parser.add_argument("--tokens", type=int, help="tokens decoded (default: a quarter of the context, 128 at most)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", help="what should be known of the machine, kept with the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {preset: measure(preset, args) for preset in args.presets}
    file = write_result(
        "decode_latency" + ("-cuda" if args.device == "cuda" else ""),
        {
            "what": "ms a decoded token (with and without a KV cache) and prefill tokens/s, variants in turn; medians "
            f"of the rounds, and medians of each round's ratio of times to {BASE} (below 1 is faster)",
            **({"note": args.note} if args.note else {}),
            "settings": {name: getattr(args, name) for name in ("device", "batch", "rounds")},
            "presets": results,
        },
    )
    print(f"written to {file}")


def measure(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """All placements of one shape."""
    shape = model_presets[preset]
    prompt = args.prompt or shape.context // 2
    tokens = args.tokens or min(shape.context // 4, 128)
    if prompt + max(tokens, UNCACHED_TOKENS) > shape.context:
        raise SystemExit(f"{preset}: {prompt} + {tokens} tokens do not fit into the context of {shape.context}")
    device = torch.device(args.device)
    torch.manual_seed(0)
    models = {name: LanguageModel(replace(shape, placement=placements[name]), device).eval() for name in PLACEMENTS}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(shape.vocab_size, (args.batch, prompt), generator=generator).tolist()
    dtype = pick_autocast("auto", device)
    rounds = []
    with torch.autocast(device.type, dtype, enabled=dtype is not None):  # which keeps the weights' copies throughout
        for index in range(args.rounds + 1):
            rounds.append({name: time_model(model, prompts, tokens) for name, model in turned(models, index)})
            print(f"{preset}: round {index} of {args.rounds}", end="\r", flush=True)
    found = summary(rounds[1:], args.batch * prompt)  # the first one warms up
    print_table(preset, found)
    return {"prompt_tokens": prompt, "decoded_tokens": tokens, "dtype": str(dtype or torch.float32), **found}


def turned(models: dict[str, LanguageModel], by: int) -> Iterator[tuple[str, LanguageModel]]:
    """The models, each round beginning with another one."""
    names = list(models)
    by %= len(names)
    return ((name, models[name]) for name in names[by:] + names[:by])


def time_model(model: LanguageModel, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Seconds of the prefill, and of a decoded token with and without a cache."""
    prefill, cached = time_stream(model, prompts, tokens, use_cache=True)
    _, uncached = time_stream(model, prompts, UNCACHED_TOKENS, use_cache=False)
    return {"prefill": prefill, "cached": cached, "uncached": uncached}


def time_stream(model: LanguageModel, prompts: list[list[int]], tokens: int, *, use_cache: bool) -> tuple[float, float]:
    """Seconds to the first token, and seconds a token of those after it; each waits for the device."""
    start = time.perf_counter()
    stream = generate_stream(model, prompts, tokens + 1, temperature=0, use_cache=use_cache)
    next(stream)
    first = time.perf_counter()
    for _ in stream:
        pass
    return first - start, (time.perf_counter() - first) / tokens


def summary(rounds: list[dict[str, dict[str, float]]], prompt_tokens: int) -> dict[str, Any]:
    """Medians a placement, of its times and of its ratios to the base in the same round."""
    found: dict[str, Any] = {}
    for name in PLACEMENTS:
        seconds = {part: [one[name][part] for one in rounds] for part in rounds[0][name]}
        ratios = {part: [one[name][part] / one[BASE][part] for one in rounds] for part in seconds}
        speedups = [one[name]["uncached"] / one[name]["cached"] for one in rounds]
        found[name] = {
            "decode_ms": 1e3 * statistics.median(seconds["cached"]),
            "decode_ms_without_cache": 1e3 * statistics.median(seconds["uncached"]),
            "prefill_tokens_per_second": prompt_tokens / statistics.median(seconds["prefill"]),
            "cache_speedup": statistics.median(speedups),
            "decode_ratio": statistics.median(ratios["cached"]),
            "decode_ratio_quartiles": statistics.quantiles(ratios["cached"], n=4)[::2],
            "decode_ratio_without_cache": statistics.median(ratios["uncached"]),
            "prefill_ratio": statistics.median(ratios["prefill"]),
        }
    return {"placements": found, "seconds": {name: [one[name] for one in rounds] for name in PLACEMENTS}}


def print_table(preset: str, found: dict[str, Any]) -> None:
    """The medians on the terminal."""
    print()
    print(
        f"{preset:12} {'decode ms':>10} {'no cache':>10} {'prefill/s':>12} {'decode ratio':>13} {'prefill ratio':>14}"
    )
    for name, row in found["placements"].items():
        print(
            f"{name:12} {row['decode_ms']:10.3f} {row['decode_ms_without_cache']:10.3f} "
            f"{row['prefill_tokens_per_second']:12,.0f} {row['decode_ratio']:13.3f} {row['prefill_ratio']:14.3f}"
        )


if __name__ == "__main__":
    main()
