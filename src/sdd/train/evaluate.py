"""Held-out loss and bits per byte, and a sample of text."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdd.data import Tokenizer
from sdd.models import LanguageModel, generate
from sdd.train.config import RunConfig
from sdd.train.parallel import ALONE, World
from sdd.train.sharding import gathered


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: mean cross-entropy in nats a token.
        bits_per_byte: code length of the same text in bits a byte of UTF-8, comparable between tokenizers; None if the
            tokens' lengths are not known.
        tokens: number of predicted tokens.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int

    def row(self) -> dict[str, Any]:
        """The columns of metrics.jsonl and result.json."""
        return {"eval_loss": self.loss, "eval_bits_per_byte": self.bits_per_byte, "eval_tokens": self.tokens}

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}"
        return text if self.bits_per_byte is None else f"{text}, {self.bits_per_byte:.4f} bits per byte"


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    windows: Tensor,
    batch_size: int,
    *,
    token_bytes: np.ndarray | None = None,
    document_eos: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Compute the loss of a model on fixed windows, which the processes of a run share.

    `loss = sum(nll) / n_tokens` and `bits_per_byte = sum(nll) / (ln 2 * bytes of the predicted tokens)`. Each nll is
    over the model's whole vocabulary, ids without text included. An end of text is predicted like any token and has 0
    bytes.

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
            tokens = windows[rows].to(device)  # -1 repeats the last: all processes must make equally many passes
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                losses = model(tokens[:, :-1], tokens[:, 1:], document_eos=document_eos, reduction="none")
            total += losses[rows >= 0].double().sum().item()
    total = world.sum(total)
    model.train(was_training)
    return evaluation_of(total, windows, token_bytes)


def evaluation_of(nll: float, windows: Tensor, token_bytes: np.ndarray | None) -> Evaluation:
    """The evaluation whose sum of losses is `nll` nats; the other arguments are those of `evaluate`."""
    targets = windows[:, 1:]
    n_bytes = None if token_bytes is None else int(token_bytes[targets.numpy()].sum())
    bits_per_byte = nll / math.log(2) / n_bytes if n_bytes else None
    return Evaluation(nll / targets.numel(), bits_per_byte, targets.numel())


def sample(
    model: LanguageModel, config: RunConfig, tokenizer: Tokenizer, windows: Tensor, autocast_dtype: torch.dtype | None
) -> dict[str, str]:
    """Continue the start of a held-out text, for samples.jsonl.

    All processes of a run must call it: each holds parts of the model that the others need.

    Args:
        model: the model; left in training mode.
        config: the run.
        tokenizer: decodes the text.
        windows: held-out tokens `[N, T]`; the first row is the text.
        autocast_dtype: bfloat16, or None for the model's own precision.

    Returns:
        The prompt, and the text that the model wrote after it.
    """
    device = model.embed.weight.device
    prompt = windows[:1, : min(24, config.model.context)].to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    autocast = torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None)
    # each step of generation has another shape, and compiled blocks would be compiled for every one
    eager = torch.compiler.set_stance("force_eager") if config.compile is True else nullcontext()
    model.eval()
    with gathered(model), autocast, eager:
        whole = generate(
            model,
            prompt,
            config.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            generator=generator,
            allowed=torch.from_numpy(tokenizer.writable(config.model.vocab_size)),
        )
    model.train()
    tokens, cut = whole[0].tolist(), prompt.shape[1]
    return {"prompt": tokenizer.decode(tokens[:cut]), "text": tokenizer.decode(tokens[cut:])}
