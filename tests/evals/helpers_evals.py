"""Small models to score with, and files of requests."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch

from sdd.evals.scorer import RunScorer
from sdd.evals.text import TrainedRun
from sdd.models import LanguageModel, ModelConfig
from sdd.train import RunConfig

CONTEXT = 24


def scorer(seed: int = 0, context: int = CONTEXT) -> RunScorer:
    """A model with random weights and the built-in tokenizer."""
    shape = ModelConfig(n_layers=2, d_model=16, d_ff=32, n_heads=2, n_kv_heads=1, vocab_size=4096, context=context)
    config = RunConfig(shape, device="cpu")
    torch.manual_seed(seed)
    model = LanguageModel(shape).eval()
    with torch.no_grad():
        model.embed.weight.normal_()
    return RunScorer(TrainedRun(config, model, seed))


def request(document: int, index: int, context: str, continuation: str, label: Any = 0) -> dict[str, Any]:
    words = {"context": context, "continuation": continuation}
    return {"request": words, "doc_id": document, "idx": index, "label": label}


def write_requests(path: Path, rows: list[dict[str, Any]], primary: str = "acc_raw") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    (path.parent / "config.json").write_text(json.dumps({"task_config": {"primary_metric": primary}}))
    return path


def choice_rows(documents: int = 3, choices: int = 3, unconditional: bool = True) -> list[dict[str, Any]]:
    """Questions about numbers; the unconditional requests come after each question's own."""
    rows = []
    for document in range(documents):
        question = f"Question: what is {document} plus {document}?\nAnswer:"
        answers = [f" {2 * document + index}{' or so' * index}" for index in range(choices)]
        for start, context in ((0, question), (1_000_000, "Answer:"))[: 1 + unconditional]:
            rows += [
                request(start + document, index, context, answer, document % choices)
                for index, answer in enumerate(answers)
            ]
    return rows
