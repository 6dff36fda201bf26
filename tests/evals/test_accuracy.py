"""Accuracies, errors and chance against a plain reading of their formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.evals.accuracy import summarise
from sdd.evals.likelihood import Score
from sdd.evals.requests import Document, Task

LENGTHS = {"acc": lambda text, tokens: 1, "acc_per_char": lambda text, tokens: len(text[1:])}
LENGTHS |= {"acc_per_byte": lambda text, tokens: len(text[1:].encode()), "acc_per_token": lambda text, tokens: tokens}


@given(seed=st.integers(0, 2**32 - 1), documents=st.integers(1, 12), choices=st.integers(2, 5))
def test_accuracies_follow_their_formulas(seed: int, documents: int, choices: int) -> None:
    draw = np.random.default_rng(seed)
    scores, found = {}, []
    for number in range(documents):
        words = [
            f" {'é' * int(draw.integers(1, 5))}{'x' * int(draw.integers(0, 5))}{index}" for index in range(choices)
        ]
        asked = tuple((f"q{number}", word) for word in words)
        alone = tuple(("Answer:", f"{word}{number}") for word in words)
        for text in (*asked, *alone):
            scores[text] = Score(-float(draw.exponential(20)), False, int(draw.integers(1, 6)), 0)
        found.append(Document(number, asked, alone, int(draw.integers(choices))))
    result = summarise(Task("t", found), scores)
    for name, length in LENGTHS.items():
        hits = [
            np.argmax([scores[text].logprob / length(text[1], scores[text].tokens) for text in one.choices])
            == one.label
            for one in found
        ]
        assert result[name] == pytest.approx(np.mean(hits))
        assert result[f"{name}_stderr"] == pytest.approx(np.std(hits) / math.sqrt(documents))
    gains = [
        [scores[a].logprob - scores[b].logprob for a, b in zip(one.choices, one.unconditional, strict=True)]
        for one in found
    ]
    assert result["acc_pmi"] == pytest.approx(
        np.mean([np.argmax(g) == d.label for g, d in zip(gains, found, strict=True)])
    )
    right = [one.choices[one.label] for one in found]
    bits = -sum(scores[text].logprob for text in right) / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / sum(len(text[1].encode()) for text in right))
    assert result["chance"] == pytest.approx(1 / choices)


def test_chance_is_the_mean_over_documents() -> None:
    documents = [Document(n, tuple((f"{n}", f" {c}") for c in range(size)), (), 0) for n, size in enumerate((2, 4))]
    scores = {text: Score(-1.0, False, 1, 5) for document in documents for text in document.choices}
    result = summarise(Task("t", documents), scores)
    assert result["chance"] == pytest.approx(3 / 8)
    assert result["acc"] == 1.0, "the first of equal values counts"
    assert result["cut"] == 6
    assert "acc_pmi" not in result


def test_without_choices_accuracy_is_greedy_and_perplexity_is_a_continuations() -> None:
    documents = [Document(n, ((f"{n}", " word"),), (), 0) for n in range(4)]
    scores = {document.choices[0]: Score(-float(n), n == 0, 1, 0) for n, document in enumerate(documents)}
    result = summarise(Task("t", documents, "acc_per_char"), scores)
    assert (result["acc"], result["chance"], result["primary"]) == (0.25, None, "acc")
    assert result["perplexity"] == pytest.approx(math.exp(1.5))
