"""A model whose vocabulary is larger than its tokenizer's: ids without text are never drawn, and count no bytes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdd.data import Tokenizer, builtin_tokenizer
from sdd.evals.generation import continue_texts
from sdd.evals.text import TrainedRun, _evaluate_ids, load_trained
from sdd.models import LanguageModel
from sdd.train import evaluate as evaluation

PADDED = 4096 + 64


@pytest.fixture
def trained(run: Path) -> TrainedRun:
    """A model that gives all its probability to ids without text, and what is left to the others."""
    config = load_trained(run).config
    config = replace(config, model=replace(config.model, vocab_size=PADDED))
    torch.manual_seed(0)
    model = LanguageModel(config.model).eval()
    with torch.no_grad():
        model.head_weight[4096:] *= 1e4
    return TrainedRun(config, model, 0)


def test_ids_without_text_are_never_drawn(trained: TrainedRun, monkeypatch):
    drawn: list[int] = []
    push = evaluation.Tokenizer.decode

    def decode(self: Tokenizer, ids) -> str:
        drawn.extend(ids := list(ids))
        return push(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    made = list(continue_texts(trained, ["Line 1", "Line 2"], 40, temperature=1.0))
    windows = torch.tensor([builtin_tokenizer().encode("Line 1 says 1. Line 2 says")])
    evaluation.sample(trained.model, replace(trained.config, sample_tokens=20), builtin_tokenizer(), windows, None)
    assert all(continuation.text for continuation in made)
    assert max(drawn) < 4096


def test_ids_beyond_the_tokenizer_count_no_bytes(trained: TrainedRun):
    tokenizer = builtin_tokenizer()
    ids = tokenizer.encode("Line 1 says 1.")
    padded = torch.tensor([*ids, 4100, PADDED - 1]).numpy()
    plain, both = (
        _evaluate_ids(trained, tokens, tokenizer, None, np.zeros(1, int), lambda done, total: None)
        for tokens in (padded[: len(ids)], padded)
    )
    assert plain.bits_per_byte is not None
    assert both.bits_per_byte is not None
    # the same bytes, more bits
    ratio = both.bits_per_byte / plain.bits_per_byte
    assert ratio == pytest.approx(both.loss * both.tokens / (plain.loss * plain.tokens))
