"""Sampling text from a language model, token by token."""

import torch
from torch import Tensor

from sdd.models.transformer import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a prompt by sampling from `softmax(logits / temperature)`.

    Past the model's context the oldest tokens are dropped from what the model sees, not from the result.

    Args:
        model: a language model.
        prompt_BT: int64 `[B, T]`, at least one token.
        max_new_tokens: how many tokens to add.
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the smallest set of tokens whose probabilities sum to p (nucleus, arXiv 1904.09751).
        eos: after it a row repeats it, and sampling stops once every row has it.
        generator: for reproducible draws.

    Returns:
        int64 `[B, T + at most max_new_tokens]`, the prompt included.

    Raises:
        ValueError: if the prompt is empty or a setting is out of range.
    """
    _check_settings(prompt_BT, max_new_tokens, temperature, top_k, top_p)
    tokens_BT = prompt_BT
    finished_B1 = torch.zeros_like(tokens_BT[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        hidden_BTC = model.hidden(tokens_BT[:, -model.config.context :])
        logits_BV = (hidden_BTC[:, -1] @ model.head_weight.T).float()
        next_B1 = sample(logits_BV, temperature, top_k, top_p, generator)
        if eos is not None:
            next_B1 = next_B1.masked_fill(finished_B1, eos)
            finished_B1 = finished_B1 | (next_B1 == eos)
        tokens_BT = torch.cat([tokens_BT, next_B1], 1)
        if eos is not None and bool(finished_B1.all()):
            break
    return tokens_BT


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row, int64 `[B, 1]`; the settings are those of `generate`."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    probabilities, order = (logits_BV / temperature).softmax(-1).sort(-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        # keep a token if what stands before it has not reached p: the most likely one always stays
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def _check_settings(
    prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"the prompt has shape {list(prompt.shape)}, expected [batch, at least one token]")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
