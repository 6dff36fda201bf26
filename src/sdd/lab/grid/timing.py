"""The time of training steps: how long a grid will take, and the cost of a token for each method.

    OUT/timing.json     seconds a token of each arm; delete it to time them anew

Wall-clock times of runs cannot compare methods, because they include whatever else the machine did. So steps of all
methods are timed in turn, while no run of the study is going.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sdd.errors import UserError
from sdd.files import write_aside
from sdd.models import LanguageModel
from sdd.train import RunConfig
from sdd.train.optim import build_optimizer, clip_gradients
from sdd.train.parallel import pick_autocast, pick_device
from sdd.train.run_dir import environment
from sdd.train.weights import WeightRule

ROUNDS = 7
_START_SECONDS = 6.0  # of a process: importing torch, opening the data
_TIMED_STEPS = 2
_MOST_SECONDS = 10.0  # spent on timing; methods not timed by then count as the mean of the others, block for block


def seconds_per_token(configs: Mapping[str, RunConfig], threads: int, out: Path) -> dict[str, float]:
    """Seconds of training a token by name, read from OUT/timing.json or else measured and written there.

    Args:
        configs: a run of each method.
        threads: of a run.
        out: the study's folder.

    Raises:
        UserError: if the file is damaged.
    """
    file = out / "timing.json"
    known = _read(file)
    if known.keys() >= configs.keys():
        return {name: known[name] for name in configs}
    rounds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(ROUNDS):
        for name, config in configs.items():
            rounds[name].append(step_seconds(config, threads) / config.tokens_per_step)
    found = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    config = next(iter(configs.values()))
    machine = environment(pick_device(config.device), config.precision) | {"threads": threads}
    del machine["command"]
    values = {"seconds_per_token": found, "rounds": rounds, "environment": machine}
    write_aside(file, json.dumps(values, indent=2) + "\n")
    return found


def step_seconds(config: RunConfig, threads: int) -> float:
    """Seconds of one optimiser step on this machine: the shortest of two on random tokens, after one that warms up."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return min(_time_steps(config))
    finally:
        torch.set_num_threads(before)


def run_seconds(config: RunConfig, seconds_a_step: float) -> float:
    """Seconds of a run: its start, its steps, and its evaluations, which cost a third of a step for each token."""
    evaluations = 1 if not config.eval_every else -(-config.steps // config.eval_every)
    eval_tokens = config.eval_sequences * config.model.context * evaluations
    return _START_SECONDS + seconds_a_step * (config.steps + eval_tokens / (3 * config.tokens_per_step))


def grid_seconds(configs: Sequence[RunConfig], threads: int, workers: int) -> float:
    """Estimate the seconds that runs take on `workers` workers, as if runs side by side did not slow each other."""
    timed: dict[str, float] = {}
    by_block: list[float] = []
    began = time.monotonic()
    total = 0.0
    for config in configs:
        blocks = config.model.n_layers
        model, optim = replace(config.model, init_scale=1.0), (config.optim.name, config.weight_rule)
        kind = repr((model, config.data.batch_size, config.accumulate, optim, config.precision))
        if kind not in timed:
            late = timed and time.monotonic() - began > _MOST_SECONDS
            timed[kind] = blocks * statistics.mean(by_block) if late else step_seconds(config, threads)
            by_block.append(timed[kind] / blocks)
        total += run_seconds(config, timed[kind])
    return total / workers


def _read(file: Path) -> dict[str, float]:
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {name: float(seconds) for name, seconds in values["seconds_per_token"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: delete it, and the methods are timed anew") from None


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
    rule = WeightRule(model, optimizer, config.weight_rule)
    seconds: list[float] = []
    for _ in range(1 + _TIMED_STEPS):
        began = time.perf_counter()
        for _ in range(config.accumulate):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                model(tokens[:, :-1], tokens[:, 1:]).backward()
        norm = clip_gradients(model, config.optim.grad_clip)
        rule.step()
        optimizer.zero_grad()
        norm.item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
