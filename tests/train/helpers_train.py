"""A run small enough to train in a second."""

import json
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file

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
#: For several processes: d_ff and the vocabulary divide neither by 2 nor by 4, and the gradient norm is about 1.4, so
#: clipping is at work.
UNEVEN = replace(
    TINY,
    model=replace(TINY.model, d_ff=51, vocab_size=4097),
    data=replace(TINY.data, batch_size=8),
    optim=replace(TINY.optim, grad_clip=0.5),
    accumulate=8,
    steps=20,
    checkpoint_every=0,
)


def tiny(placement="sdd", **changes):
    """TINY with another placement and other fields."""
    return replace(TINY, model=replace(TINY.model, placement=placements[placement]), **changes)


def rows(run, *, timed=False):
    """The rows of metrics.jsonl, by default without what the clock decides."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = () if timed else ("seconds", "time", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in clock} for row in found]


def little(folder, **changes):
    """TINY over 64 tokens in `folder`/tokens.npy, which makes its checkpoints small too."""
    folder.mkdir(parents=True, exist_ok=True)
    np.random.default_rng(0).integers(0, 64, 6000).astype(np.uint16).tofile(folder / "tokens.npy")
    data = replace(TINY.data, path=str(folder / "tokens.npy"), dtype="uint16", eos=0)
    return replace(TINY, data=data, model=replace(TINY.model, n_layers=1, vocab_size=64), **changes)


def assert_same_tensors(one, two):
    """Two checkpoints hold the same, bit for bit."""
    one, two = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (one, two)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
