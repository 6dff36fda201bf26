"""Held-out loss and bits per byte."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from sdd.models import LanguageModel
from sdd.train.parallel import ALONE, World
from sdd.train.sharding import gathered


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: mean cross-entropy in nats a token.
        bits_per_byte: the same text's code length a byte of UTF-8, comparable between tokenizers; None if the
            tokens' lengths are not known.
        tokens: number of predicted tokens.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    windows: torch.Tensor,
    batch_size: int,
    *,
    token_bytes: np.ndarray | None = None,
    document_eos: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Loss of a model on fixed windows; several processes share them.

    `loss = sum(nll) / n_tokens` and `bits_per_byte = sum(nll) / (ln 2 * bytes of the predicted tokens)`.

    Args:
        model: the model; left in the mode it was in.
        windows: int64 `[N, T + 1]`.
        batch_size: windows a forward pass, in each process.
        token_bytes: int `[vocab_size]`, bytes of UTF-8 each token stands for; None if unknown.
        document_eos: see `LanguageModel.forward`.
        autocast_dtype: bfloat16, or None for the model's own precision.
        world: the processes that hold the model.
    """
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    total = 0.0
    with gathered(model):
        for rows in world.share(len(windows)).split(batch_size):
            tokens = windows[rows].to(device)  # -1 repeats the last one: every process must take as many passes
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                losses = model(tokens[:, :-1], tokens[:, 1:], document_eos=document_eos, reduction="none")
            total += losses[rows >= 0].double().sum().item()
    total = world.sum(total)
    model.train(was_training)
    targets = windows[:, 1:]
    n_bytes = None if token_bytes is None else int(token_bytes[targets.numpy()].sum())
    return Evaluation(
        loss=total / targets.numel(),
        bits_per_byte=total / math.log(2) / n_bytes if n_bytes else None,
        tokens=targets.numel(),
    )
