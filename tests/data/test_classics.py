import json
from collections import Counter

import numpy as np
import pytest
import zstandard

from sdd.data import TokenFile, builtin_tokenizer, classics, source
from sdd.data.spec import CLASSICS, existing


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    with existing(CLASSICS).open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    return [json.loads(line) for line in data.splitlines()]


def texts(file: TokenFile) -> list[str]:
    ends = np.flatnonzero(file.tokens == file.eos)
    decode = builtin_tokenizer().decode
    return [decode(file.tokens[a:b]) for a, b in zip([0, *ends[:-1] + 1], ends, strict=True)]


def test_training_and_validation_part_every_document_and_every_source_is_held_out(rows: list[dict]):
    train, validation = classics()
    tails = iter(texts(validation))
    tail = next(tails)
    held_out: Counter[str] = Counter()
    for row, head in zip(rows, texts(train), strict=True):
        if head == row["text"]:
            continue
        assert head + tail == row["text"]  # so no character is in both, and none is in neither
        held_out[row["source"]] += len(tail)
        tail = next(tails, "")
    assert tail == ""
    total = Counter()
    for row in rows:
        total[row["source"]] += len(row["text"])
    assert total.keys() == held_out.keys() == {"sotu", "kjv", "austen", "moby-dick"}
    shares = {source: held_out[source] / total[source] for source in total}
    assert 0.045 < min(shares.values()) <= max(shares.values()) < 0.055, shares


def test_the_files_know_what_they_hold(rows: list[dict]):
    train, validation = classics()
    sizes = builtin_tokenizer().token_bytes()
    assert sizes is not None
    assert train.info.n_bytes == sizes[train.tokens].sum()
    assert validation.info.n_bytes == sizes[validation.tokens].sum()
    assert sizes[train.tokens].sum() + sizes[validation.tokens].sum() == sum(len(r["text"].encode()) for r in rows)
    assert train.info.n_documents == len(rows)
    assert train.info.tokenizer
    assert train.info.tokenizer.sha256 == builtin_tokenizer().sha256


def test_they_are_tokenised_once(monkeypatch: pytest.MonkeyPatch):
    first, _ = classics()
    monkeypatch.setattr(source, "tokenize_inputs", pytest.fail)
    again, _ = classics(notify=pytest.fail)
    assert again.fingerprint() == first.fingerprint()
