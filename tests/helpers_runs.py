"""Run directories as the trainer would leave them, made without training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sdd.placement import placements
from sdd.probing import append_row
from sdd.train import RunConfig, config_io, preset
from sdd.train.run_dir import RunDir


def config_of(placement: str = "sdd", steps: int = 60, seed: int = 0, lr: float = 4e-3) -> RunConfig:
    base = preset("nano")
    return replace(
        base,
        steps=steps,
        seed=seed,
        model=replace(base.model, placement=placements[placement]),
        optim=replace(base.optim, lr=lr),
    )


def write_run(
    path: Path,
    config: RunConfig,
    *,
    end: float = 5.0,
    until: int | None = None,
    breaks_at: int | None = None,
    probed: bool = False,
    fades_at: int | None = None,
    experts: int = 0,
    dead_from: int | None = None,
) -> Path:
    """Write the run directory of a run of three blocks.

    Args:
        path: the directory.
        config: steps, seed and learning rate count.
        end: the loss that the run approaches.
        until: leave the run unfinished at this step.
        breaks_at: make the loss of this step nan, and end there.
        probed: write probe.jsonl, a row every ten steps.
        fades_at: let the gradient fade in block 1 from this step on.
        experts: so many in each block.
        dead_from: from this step on, give all tokens of block 2 to its first expert.
    """
    path.mkdir(parents=True)
    config_io.save(config, path / "config.json")
    files = RunDir(path)
    files.write_json("environment.json", {"sdd": "0", "torch": "2", "command": ["sdd", "train"]})
    noise = np.random.default_rng(config.seed).standard_normal(config.steps + 1)
    last = until or breaks_at or config.steps
    for step in range(1, last + 1):
        loss = end + (8.3 - end) * np.exp(-5 * step / config.steps)
        broken = step == breaks_at
        shared = {"step": step, "tokens": step * config.tokens_per_step, "seconds": 0.1 * step}
        row = {"loss": loss + 0.1 * noise[step], "grad_norm": np.exp(noise[step]), "lr": config.optim.lr}
        routing = routing_row(experts, dead_from is not None and step >= dead_from) if experts else {}
        loads = {"expert_load": routing.pop("expert_load")} if experts else {}
        files.append("metrics.jsonl", {**shared, **(dict.fromkeys(row, float("nan")) if broken else row), **routing})
        if step % 10 == 0 and not broken:
            bits = {"eval_loss": loss, "eval_bits_per_byte": 0.3657 * loss, "eval_tokens": 8192}
            files.append("metrics.jsonl", {"step": step, **bits, **loads})
    for step in range(10, last + 1, 10) if probed else ():
        row = probe_row(step, noise[step])
        if fades_at and step >= fades_at:
            row["layers"]["grad_rms"][:2] = [1e-12, 1e-12]
        append_row(path / "probe.jsonl", row)
    result = {"placement": config.model.placement.name, "step": last, "steps": config.steps, "seconds": 0.1 * last}
    if breaks_at:
        reason = f"step {last}: loss nan, gradient norm nan: not finite"
        files.write_json("result.json", {"status": "failed", **result, "cause": "diverged", "reason": reason})
    elif until is None:
        files.append("samples.jsonl", {"step": last, "prompt": "It was", "text": " the best of times"})
        files.write_json("result.json", {"status": "done", **result, "parameters": 1_080_768})
    return path


def probe_row(step: int, noise: float = 0.0, blocks: int = 3) -> dict[str, Any]:
    """Make a row of a healthy probe.jsonl."""
    rough = float(np.exp(0.1 * noise))
    matrix = {"rms": rough, "grad_rms": 1e-4, "weight_norm": 5.0, "weight_grad_rms": 1e-3, "update_ratio": 0.01}
    sites: dict[str, dict[str, float]] = {"embed": {**matrix, "angle": 0.01}}
    for block in range(blocks):
        sites[f"blocks.{block}.attn"] = {"logit_max": 4 * rough, "entropy": 3 / rough}
        sites[f"blocks.{block}.attn.o_proj"] = {
            **matrix,
            "angle": 0.01,
            "eps_ratio": 1e-5 * rough,
            "eps_ratio_max": 1e-4,
            "alpha_norm": 8 * rough,
            "alpha_grad_rms": 1e-3,
        }
        sites[f"blocks.{block}.ffn.up_proj"] = {**matrix, "angle": 0.01 * rough}
    stream = [rough] * (blocks + 1)
    return {
        "step": step,
        "sites": sites,
        "layers": {"rms": stream, "cosine": stream[1:], "grad_rms": [1e-4] * (blocks + 1)},
    }


def routing_row(experts: int, dead: bool) -> dict[str, Any]:
    """Make the columns of a mixture of three blocks, balanced but for the last block if `dead`."""
    even = [1.0] * experts
    loads = [even, even, [float(experts)] + [0.0] * (experts - 1) if dead else even]
    worst, without = [max(load) for load in loads], [load.count(0.0) for load in loads]
    return {
        "balance_loss": sum(worst) / 3,
        "router_z_loss": 4.8,
        "router_entropy": 1.5,
        "worst_load": max(worst),
        "dead_experts": sum(without),
        "routing": {"entropy": [1.5, 1.6, 1.4], "worst_load": worst, "dead_experts": without},
        "expert_load": loads,
    }


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
