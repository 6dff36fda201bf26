"""What a grid will take, before it starts: a few steps of each method are timed on this machine."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from sdd.models import LanguageModel
from sdd.train import RunConfig
from sdd.train.optim import build_optimizer, clip_gradients
from sdd.train.parallel import pick_autocast, pick_device

_START_SECONDS = 6.0  # of a process: importing torch, opening the data
_TIMED_STEPS = 2
_MOST_SECONDS = 10.0  # spent on timing; what is not timed by then is taken to be like the rest


def step_seconds(config: RunConfig, threads: int) -> float:
    """Seconds of one optimiser step on this machine: the shortest of two on random tokens, after one that warms up."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return min(_time_steps(config))
    finally:
        torch.set_num_threads(before)


def run_seconds(config: RunConfig, seconds_a_step: float) -> float:
    """Seconds of a run: its start, its steps, and its evaluations at a third of a step's cost a token."""
    evaluations = 1 if not config.eval_every else -(-config.steps // config.eval_every)
    eval_tokens = config.eval_sequences * config.model.context * evaluations
    return _START_SECONDS + seconds_a_step * (config.steps + eval_tokens / (3 * config.tokens_per_step))


def grid_seconds(configs: Sequence[RunConfig], threads: int, workers: int) -> float:
    """About how many seconds runs take, so many at once; what runs beside each other costs each other is not known."""
    timed: dict[str, float] = {}
    began = time.monotonic()
    total = 0.0
    for config in configs:
        kind = repr((replace(config.model, init_scale=1.0), config.data.batch_size, config.accumulate))
        if kind not in timed:
            late = timed and time.monotonic() - began > _MOST_SECONDS
            timed[kind] = sum(timed.values()) / len(timed) if late else step_seconds(config, threads)
        total += run_seconds(config, timed[kind])
    return total / workers


def _time_steps(config: RunConfig) -> list[float]:
    device = pick_device(config.device)
    dtype = pick_autocast(config.precision, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel(config.model).to(device)
        rows = config.data.batch_size // config.accumulate
        tokens = torch.randint(config.model.vocab_size, (rows, config.model.context + 1)).to(device)
    model.checkpoint_blocks = config.activation_checkpointing
    optimizer = build_optimizer(model, config.optim)
    seconds: list[float] = []
    for _ in range(1 + _TIMED_STEPS):
        began = time.perf_counter()
        for _ in range(config.accumulate):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                model(tokens[:, :-1], tokens[:, 1:]).backward()
        norm = clip_gradients(model, config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        norm.item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
