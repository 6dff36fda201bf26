"""A run small enough to train in a second."""

import json
from dataclasses import replace

from sdd.models import ModelConfig
from sdd.placement import placements
from sdd.train import DataConfig, OptimConfig, RunConfig

TINY = RunConfig(
    model=ModelConfig(n_layers=2, d_model=32, d_ff=48, n_heads=2, n_kv_heads=1, vocab_size=4096, context=32),
    data=DataConfig(batch_size=4),
    optim=OptimConfig(lr=4e-3, warmup=3),
    steps=12,
    eval_every=6,
    eval_sequences=8,
    checkpoint_every=4,
    keep_checkpoints=0,
    sample_tokens=8,
)


def tiny(placement="sdd", **changes):
    """TINY with another placement and other fields."""
    return replace(TINY, model=replace(TINY.model, placement=placements[placement]), **changes)


def rows(run, *, timed=False):
    """The rows of metrics.jsonl, by default without what the clock decides."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = () if timed else ("seconds", "time", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in clock} for row in found]
