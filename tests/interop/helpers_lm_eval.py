"""A small trained run, and files of requests."""

import json

from sdd.models import ModelConfig
from sdd.train import DataConfig, OptimConfig, RunConfig
from sdd.train.trainer import start


def small_run(folder):
    """A run of 4 steps with a context of 32 tokens and the built-in tokenizer."""
    text = folder / "numbers.txt"
    text.write_text("\n".join(f"Line {number} says {number * number}." for number in range(2000)))
    config = RunConfig(
        model=ModelConfig(n_layers=1, d_model=16, d_ff=32, n_heads=2, n_kv_heads=1, vocab_size=4096, context=32),
        data=DataConfig(path=str(text), batch_size=2),
        optim=OptimConfig(lr=1e-2, warmup=2),
        steps=4,
        eval_every=0,
        sample_tokens=0,
        device="cpu",
    )
    start(config, folder / "run").run()
    return folder / "run"


def choice_rows(documents):
    """Requests: questions about numbers with three answers each."""
    return [
        {
            "request": {"context": f"Question: what is {document}?\nAnswer:", "continuation": answer},
            "doc_id": document,
            "idx": index,
            "label": document % 3,
        }
        for document in range(documents)
        for index, answer in enumerate((f" {document}", f" {document} or so", " nothing"))
    ]


def write_requests(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
