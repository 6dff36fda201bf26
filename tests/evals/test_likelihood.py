"""Log-likelihoods of continuations against token by token ones, whatever the batch, the padding and the length."""

import pytest
import torch
from helpers_evals import CONTEXT, scorer
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.errors import RunFailed, UserError
from sdd.evals.likelihood import Pair, Score, encode_pairs, score
from sdd.evals.scorer import RunScorer

MODEL = scorer()
WORDS = st.text("ab cd. \nit was", min_size=1, max_size=30)
PAIRS = st.lists(
    st.tuples(st.lists(st.integers(0, 4095), min_size=1, max_size=40), st.lists(st.integers(0, 4095), min_size=1)),
    min_size=1,
    max_size=8,
)


def scored(model: RunScorer, pairs: list[Pair], batch_size: int = 4) -> list[Score]:
    found: dict[int, Score] = {}
    for indices, scores in score(model, pairs, batch_size):
        found.update(zip(indices, scores, strict=True))
    return [found[index] for index in range(len(pairs))]


def plain(model: RunScorer, pair: Pair) -> tuple[float, bool]:
    """One token at a time, each from the most tokens before it that its stretch allows."""
    nats, greedy = 0.0, True
    for first in range(pair.start, len(pair.ids), model.context):
        stop = min(first + model.context, len(pair.ids))
        for place in range(first, stop):
            before = torch.tensor([pair.ids[max(0, stop - 1 - model.context) : place]])
            logits = model.logits(before, before.shape[1] - 1)[0, -1].double()
            nats += logits.log_softmax(-1)[pair.ids[place]].item()
            greedy &= int(logits.argmax()) == pair.ids[place]
    return nats, greedy


@settings(max_examples=15)
@given(drawn=PAIRS, batch_size=st.integers(1, 5))
def test_scores_are_those_of_one_token_at_a_time(drawn: list[tuple[list[int], list[int]]], batch_size: int) -> None:
    pairs = [Pair([*context, *continuation], len(context)) for context, continuation in drawn]
    for pair, found in zip(pairs, scored(MODEL, pairs, batch_size), strict=True):
        nats, greedy = plain(MODEL, pair)
        assert found.logprob == pytest.approx(nats, abs=1e-3)
        assert found.greedy == greedy
        assert found.tokens == len(pair.ids) - pair.start


def test_a_likely_continuation_is_found_greedy() -> None:
    ids = [7, 8, 9]
    for _ in range(3):
        logits = MODEL.logits(torch.tensor([ids]), len(ids) - 1)
        ids.append(int(logits[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % 4096]
    right, other = scored(MODEL, [Pair(ids, 3), Pair(wrong, 3)])
    assert right.greedy
    assert not other.greedy
    assert right.logprob > other.logprob


@pytest.mark.parametrize(("context", "cut"), [(CONTEXT - 3, 0), (CONTEXT - 2, 0), (CONTEXT - 1, 1), (CONTEXT + 9, 11)])
def test_what_is_cut_off_on_the_left_is_counted(context: int, cut: int) -> None:
    [found] = scored(MODEL, [Pair(list(range(1, context + 4)), context)])
    assert found.cut == cut


@given(context=WORDS, continuation=WORDS)
def test_context_and_continuation_are_one_text(context: str, continuation: str) -> None:
    if not context.strip() or not continuation.strip():
        return
    [pair] = encode_pairs(MODEL, [(context, continuation)])
    tokenizer = MODEL.tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(pair.ids) == context + continuation
    assert context.rstrip().startswith(tokenizer.decode(pair.ids[: pair.start]))


def test_white_space_after_the_context_belongs_to_the_continuation() -> None:
    one, other = encode_pairs(MODEL, [("It was ", "the best"), ("It was", " the best")])
    assert one == other


def test_a_text_without_context_begins_at_an_end_of_text() -> None:
    [pair] = encode_pairs(MODEL, [("", "It was")])
    assert pair.start == 1
    assert pair.ids[0] == MODEL.start


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(UserError, match="gives no token"):
        encode_pairs(MODEL, [("It was", "")])


def test_logits_that_are_not_finite_end_the_evaluation() -> None:
    model = scorer(1)
    with torch.no_grad():
        model._model.embed.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite"):
        scored(model, [Pair([1, 2, 3], 1)])


def test_requests_that_differ_in_their_last_token_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = MODEL.logits
    monkeypatch.setattr(MODEL, "logits", lambda ids, first: rows.append(len(ids)) or logits(ids, first))
    scored(MODEL, [Pair([1, 2, 3, last], 3) for last in range(4)], batch_size=8)
    assert rows == [1]
