from pathlib import Path

import pytest

from sdd.models import ModelConfig
from sdd.train import DataConfig, OptimConfig, RunConfig
from sdd.train.trainer import start


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints of steps 2 and 4, a context of 16 tokens and the built-in tokenizer."""
    folder = tmp_path_factory.mktemp("evals")
    text = folder / "numbers.txt"
    text.write_text("\n".join(f"Line {number} says {number * number}." for number in range(2000)))
    config = RunConfig(
        model=ModelConfig(n_layers=1, d_model=16, d_ff=32, n_heads=2, n_kv_heads=1, vocab_size=4096, context=16),
        data=DataConfig(path=str(text), batch_size=2),
        optim=OptimConfig(lr=1e-2, warmup=2),
        steps=4,
        eval_every=0,
        checkpoint_every=2,
        sample_tokens=0,
        device="cpu",
    )
    start(config, folder / "run").run()
    return folder / "run"
