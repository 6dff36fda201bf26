"""Log-likelihoods of continuations: `log p(continuation | context) = sum_t log p(token_t | tokens before it)`.

Context and continuation are tokenised as one text, as lm-eval does it: white space at the end of the context is moved
to the continuation, and the tokens after those of the context alone are the continuation. Where a token spans the
border, it belongs to the continuation as a whole. Without a context, an end of text stands before the continuation.

Rows are scored longest first, in batches padded on the right, where causal attention never looks. Rows that differ in
their last token only are read once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from sdd.errors import RunFailed, UserError
from sdd.evals.scorer import Scorer

#: The most logits of a batch, float32: 256 MiB, and as much again for their logarithms.
_LOGITS = 1 << 26


class Pair(NamedTuple):
    """Token ids of a context and its continuation, which begins at `start`."""

    ids: list[int]
    start: int


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
        logprob: its log-likelihood in nats.
        greedy: whether each of its tokens is the most likely one.
        tokens: their number.
        cut: tokens of the context that were cut off on the left because the model's context is shorter.
    """

    logprob: float
    greedy: bool
    tokens: int
    cut: int


class _Span(NamedTuple):
    """A stretch of tokens that is predicted in one pass: the inputs, and the targets, which follow the last ones."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def encode_pairs(model: Scorer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Tokenise contexts with their continuations; see the head of this module.

    Raises:
        UserError: a continuation without a token, or an empty context that no token can stand for.
    """
    moved = [_with_white_space(context, continuation) for context, continuation in texts]
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    before = dict(zip(contexts, model.encode(contexts), strict=True))
    wholes = model.encode([context + continuation for context, continuation in moved])
    return [
        _pair(model, before.get(context, []), whole, context, continuation)
        for (context, continuation), whole in zip(moved, wholes, strict=True)
    ]


def _with_white_space(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _pair(model: Scorer, before: list[int], whole: list[int], context: str, continuation: str) -> Pair:
    same = (one == other for one, other in zip(before, whole, strict=False))
    start = next((index for index, equal in enumerate(same) if not equal), min(len(before), len(whole)))
    if start == 0:  # no context, or one that is part of the continuation's first token
        if whole[:1] != [model.start]:
            if model.start is None:
                raise UserError("a text without context cannot be scored: the tokenizer has no end of text")
            whole = [model.start, *whole]
        start = 1
    if start >= len(whole):
        raise UserError(f"{continuation[:60]!r} after {context[-60:]!r} gives no token of the model's tokenizer")
    return Pair(whole, start)


def score(model: Scorer, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[list[int], list[Score]]]:
    """Score pairs, those with the most tokens first.

    A continuation longer than the model's context is predicted in stretches of `context` tokens, each from the most
    tokens before it that fit.

    Args:
        model: the model.
        pairs: contexts and continuations.
        batch_size: the most rows of a batch; long rows of a large vocabulary make smaller ones.

    Yields:
        Batch by batch, which pairs are done and their scores.

    Raises:
        RunFailed: if the model's logits are not finite.
    """
    spans = [list(_spans(pair, model.context)) for pair in pairs]
    found: dict[_Span, tuple[float, bool]] = {}
    order = sorted(range(len(pairs)), key=lambda index: -len(spans[index][0].inputs))
    waiting: list[int] = []
    for index in order:
        waiting.append(index)
        if len({span.inputs for each in waiting for span in spans[each]}) >= batch_size:
            yield waiting, _scores(model, pairs, spans, waiting, found, batch_size)
            waiting = []
    if waiting:
        yield waiting, _scores(model, pairs, spans, waiting, found, batch_size)


def _scores(
    model: Scorer,
    pairs: Sequence[Pair],
    spans: Sequence[list[_Span]],
    which: list[int],
    found: dict[_Span, tuple[float, bool]],
    batch_size: int,
) -> list[Score]:
    needed = dict.fromkeys(span for index in which for span in spans[index] if span not in found)
    for batch in _batches(list(needed), batch_size, model.vocab_size):
        found.update(_predict(model, batch))
    scores = []
    for index in which:
        parts = [found[span] for span in spans[index]]
        (ids, start), inputs = pairs[index], spans[index][0].inputs
        n_targets = len(spans[index][0].targets)
        cut = start + n_targets - 1 - len(inputs)
        scores.append(Score(sum(part[0] for part in parts), all(part[1] for part in parts), len(ids) - start, cut))
    return scores


def _spans(pair: Pair, context: int) -> Iterator[_Span]:
    """Each token of the continuation is predicted once, from as many tokens before it as fit."""
    ids, start = pair
    for first in range(start, len(ids), context):
        stop = min(first + context, len(ids))
        yield _Span(tuple(ids[max(0, stop - 1 - context) : stop - 1]), tuple(ids[first:stop]))


def _batches(spans: list[_Span], batch_size: int, vocab_size: int) -> Iterator[list[_Span]]:
    """Spans grouped by their inputs, so many different inputs a batch as its size and its logits allow."""
    by_inputs: dict[tuple[int, ...], list[_Span]] = {}
    for span in sorted(spans, key=lambda span: -len(span.inputs)):
        by_inputs.setdefault(span.inputs, []).append(span)
    batch: list[_Span] = []
    rows = 0
    for inputs, group in by_inputs.items():
        longer = [*batch, *group]
        if batch and (rows == batch_size or (rows + 1) * _kept(longer) * vocab_size > _LOGITS):
            yield batch
            batch, rows, longer = [], 0, group
        batch, rows = longer, rows + 1
        assert inputs
    if batch:
        yield batch


def _first(spans: list[_Span]) -> int:
    """The first position whose logits are needed."""
    return min(len(span.inputs) - len(span.targets) for span in spans)


def _kept(spans: list[_Span]) -> int:
    return max(len(span.inputs) for span in spans) - _first(spans)


def _predict(model: Scorer, spans: list[_Span]) -> dict[_Span, tuple[float, bool]]:
    rows = {inputs: row for row, inputs in enumerate(dict.fromkeys(span.inputs for span in spans))}
    tokens_BT = pad_sequence([torch.tensor(inputs) for inputs in rows], batch_first=True)
    first = _first(spans)
    logprobs_BTV = model.logits(tokens_BT, first).log_softmax(-1)
    best_BT = logprobs_BTV.argmax(-1)
    found = {}
    for span in spans:
        stop = len(span.inputs) - first
        places = slice(stop - len(span.targets), stop)
        targets = torch.tensor(span.targets, device=logprobs_BTV.device)
        row = rows[span.inputs]
        nats = logprobs_BTV[row, places].gather(-1, targets[:, None]).double().sum()
        found[span] = (nats.item(), bool((best_BT[row, places] == targets).all()))
    if not all(math.isfinite(nats) for nats, _ in found.values()):
        raise RunFailed("the model's logits are not finite: its weights are not, or are out of range")
    return found
