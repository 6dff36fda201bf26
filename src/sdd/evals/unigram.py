"""The loss of predicting each token by its frequency: a model that is no better has learned nothing from context."""

import math
from dataclasses import dataclass

import numpy as np

from sdd.data import DataSource, eval_windows


@dataclass(frozen=True)
class Reference:
    """Losses on held-out windows of a model that ignores the context.

    Attributes:
        loss: cross-entropy in nats a token, with each token's frequency in the training tokens as its probability.
        bits_per_byte: the same in bits a byte of UTF-8; None if the lengths of the tokens are unknown.
    """

    loss: float
    bits_per_byte: float | None


def token_frequencies(data: DataSource, eval_sequences: int, context: int) -> Reference:
    """Compute `-mean(log((count(token) + 1) / sum(count + 1)))` over the held-out windows that a run evaluates on.

    Args:
        data: counts come from its training tokens.
        eval_sequences: as in the run's config.
        context: as in the run's model.
    """
    counts = np.ones(data.vocab_size, np.int64)
    for file in data.train:
        counts += np.bincount(file.tokens, minlength=data.vocab_size)
    targets = eval_windows(data.validation, eval_sequences, context)[:, 1:].numpy()
    nats = float(-np.log(counts / counts.sum())[targets].sum())
    token_bytes = None if data.tokenizer is None else data.tokenizer.token_bytes(data.vocab_size)
    bits = None if token_bytes is None else nats / math.log(2) / int(token_bytes[targets].sum())
    return Reference(nats / targets.size, bits)
