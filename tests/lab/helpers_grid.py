"""A run for grids, over in a second."""

from pathlib import Path
from typing import Any

from sdd.models import ModelConfig
from sdd.train import DataConfig, OptimConfig, RunConfig


def tiny_run(folder: Path, **changes: Any) -> RunConfig:
    """One layer of width 16, on a text of a few thousand tokens that is written into the folder."""
    text = folder / "numbers.txt"
    text.write_text("\n".join(f"Line {number} says {number * number}." for number in range(2000)))
    usual: dict[str, Any] = {"steps": 100, "eval_every": 50, "eval_sequences": 4, "sample_tokens": 0}
    return RunConfig(
        model=ModelConfig(n_layers=1, d_model=16, d_ff=32, n_heads=2, n_kv_heads=1, vocab_size=4096, context=16),
        data=DataConfig(path=str(text), batch_size=2),
        optim=OptimConfig(lr=1e-3, warmup=2),
        **{**usual, "device": "cpu", "threads": 1, "compile": False, **changes},
    )
