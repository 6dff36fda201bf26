"""Accuracies of a task from the log-likelihoods of its choices, with their standard errors.

The answer of a model is the choice with the largest value of
    acc             log p(choice | question)
    acc_per_char    the same over its characters, without the one space before it (acc_norm of lm-eval)
    acc_per_token   over its tokens
    acc_per_byte    over its bytes of UTF-8, without the space
    acc_pmi         log p(choice | question) - log p(choice | "Answer:"), where the task has such requests
The first of equal values counts. The standard error of an accuracy is the binomial one, sqrt(p (1 - p) / n).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdd.evals.likelihood import Score
from sdd.evals.requests import Document, Task, Text


def summarise(task: Task, scores: Mapping[Text, Score]) -> dict[str, Any]:
    """The numbers of a task.

    Args:
        task: the task.
        scores: of all its texts.

    Returns:
        documents, primary (the name of the accuracy that the task's authors report), chance (the accuracy of a random
        choice), each accuracy with its standard error, bits_per_byte of the right continuations (all bytes of them),
        and cut, the number of requests whose context was cut off on the left. A task without choices has instead of
        normalised accuracies perplexity, exp(-mean log p(continuation)), and its acc says how often each token of the
        continuation is the model's most likely one; its chance is None.
    """
    documents = task.documents
    found: dict[str, Any] = {"documents": len(documents), "primary": task.primary if task.is_choice else "acc"}
    right = [document.choices[document.label] for document in documents]
    nats = -math.fsum(scores[text].logprob for text in right)
    if task.is_choice:
        found["chance"] = math.fsum(1 / len(document.choices) for document in documents) / len(documents)
        for name, hits in _hits(documents, scores).items():
            found |= _share(name, hits)
    else:
        found |= {"chance": None, **_share("acc", [scores[text].greedy for text in right])}
        found["perplexity"] = math.exp(min(nats / len(right), 700.0))
    found["bits_per_byte"] = nats / math.log(2) / sum(len(text[1].encode()) for text in right)
    found["cut"] = sum(scores[text].cut > 0 for document in documents for text in document.choices)
    return found


def _hits(documents: Sequence[Document], scores: Mapping[Text, Score]) -> dict[str, list[bool]]:
    """Which documents are answered rightly, by the name of the accuracy."""
    hits: dict[str, list[bool]] = {}
    with_pmi = all(document.unconditional for document in documents)
    for document in documents:
        for name, values in _values(document, scores, with_pmi).items():
            hits.setdefault(name, []).append(values.index(max(values)) == document.label)
    return hits


def _values(document: Document, scores: Mapping[Text, Score], with_pmi: bool) -> dict[str, list[float]]:
    logprobs = [scores[text].logprob for text in document.choices]
    answers = [continuation.removeprefix(" ") for _, continuation in document.choices]
    sizes = {
        "acc": [1 for _ in answers],
        "acc_per_char": [len(answer) for answer in answers],
        "acc_per_token": [scores[text].tokens for text in document.choices],
        "acc_per_byte": [len(answer.encode()) for answer in answers],
    }
    values = {
        name: [one / max(size, 1) for one, size in zip(logprobs, each, strict=True)] for name, each in sizes.items()
    }
    if with_pmi:
        without = [scores[text].logprob for text in document.unconditional]
        values["acc_pmi"] = [one - other for one, other in zip(logprobs, without, strict=True)]
    return values


def _share(name: str, hits: Sequence[bool]) -> dict[str, float]:
    share = sum(hits) / len(hits)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / len(hits))}
