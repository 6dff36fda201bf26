"""Sampling text from a language model, token by token.

The model sees a row through its window: all of its tokens, or the last `context` tokens of a longer prompt. When the
window is full, it starts anew with the row's last `context // 2` tokens. A window's tokens stand at positions 0, 1, ...
So the model never sees less than half a context of a long row. With a cache a token costs one token's work, plus a
reading of half a context once in every `context // 2` tokens.

Shape suffixes: B rows, T tokens, C d_model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdd.models.kv_cache import KVCache
from sdd.models.transformer import LanguageModel

#: The source of random draws: one generator for all rows, one for each row, or None for torch's global one.
Generators = torch.Generator | Sequence[torch.Generator] | None


def generate(
    model: LanguageModel,
    prompt_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed: Tensor | None = None,
    eos: int | None = None,
    generator: Generators = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue prompts of one length by sampling; see `generate_stream`.

    Args:
        model: a language model.
        prompt_BT: int64 `[B, T]`, at least one token.
        max_new_tokens: how many tokens to add.
        temperature: see `generate_stream`, also for the arguments below.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the smallest set of tokens whose probabilities sum to p.
        allowed: see `generate_stream`.
        eos: after it a row repeats it, and sampling stops once every row has it.
        generator: for reproducible draws.
        use_cache: keep keys and values.

    Returns:
        int64 `[B, T + at most max_new_tokens]`, the prompt included.

    Raises:
        ValueError: if the prompt is empty or a setting is out of range.
    """
    if prompt_BT.ndim != 2 or prompt_BT.shape[1] == 0:
        raise ValueError(f"the prompt has shape {list(prompt_BT.shape)}, expected [batch, at least one token]")
    stream = generate_stream(
        model,
        prompt_BT.tolist(),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        allowed=allowed,
        eos=eos,
        generator=generator,
        use_cache=use_cache,
    )
    rows = range(len(prompt_BT))
    steps = [[tokens.get(row, eos) for row in rows] for tokens in stream]
    added_TB = torch.tensor(steps, dtype=prompt_BT.dtype, device=prompt_BT.device).view(-1, len(rows))
    return torch.cat([prompt_BT, added_TB.T], 1)


def generate_stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed: Tensor | None = None,
    eos: int | None = None,
    stop: Callable[[int, int], bool] | None = None,
    generator: Generators = None,
    use_cache: bool = True,
) -> Iterator[dict[int, int]]:
    """Continue prompts by sampling from `softmax(logits / temperature)`, a token a row and step.

    Prompts may differ in length, and each row is what it would be alone, up to rounding. Equal prompts are read once.
    Past the model's context, the model no longer sees a row's oldest tokens: see the head of this module. The caller's
    autocast applies.

    Args:
        model: a language model.
        prompts: token ids, at least one a prompt.
        max_new_tokens: how many tokens to add to each.
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the smallest set of tokens, of those that top_k leaves, whose probabilities sum to p
            (nucleus, arXiv 1904.09751).
        allowed: bool `[V]`, the ids that may be drawn; all by default.
        eos: ends its row.
        stop: called with a row and each of its new tokens; True ends the row.
        generator: for reproducible draws. With one a row, a row's draws do not depend on the others.
        use_cache: keep keys and values, so that each token is computed once; False computes them anew for each.

    Yields:
        `{row: token}` of the rows that have not ended before.

    Raises:
        ValueError: if a prompt is empty or a setting is out of range.
        FloatingPointError: if the logits are not finite.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"prompts of {[len(prompt) for prompt in prompts]} tokens were given, expected at least one")
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    if isinstance(generator, Sequence) and len(generator) != len(prompts):
        raise ValueError(f"{len(generator)} generators were given for {len(prompts)} prompts: give one, or one each")

    if allowed is not None and (allowed.shape != (model.config.vocab_size,) or not allowed.any()):
        found = f"{int(allowed.sum())} of {list(allowed.shape)} ids"
        raise ValueError(f"{found} are allowed, expected at least one of [{model.config.vocab_size}]")

    def steps() -> Iterator[dict[int, int]]:
        windows = [list(prompt[-model.config.context :]) for prompt in prompts]
        reader = _Reader(model, windows, max_new_tokens if use_cache else None)
        rows = list(range(len(prompts)))
        barred_V = None if allowed is None or bool(allowed.all()) else ~allowed.to(model.embed.weight.device)
        for _ in range(max_new_tokens):
            logits_BV = reader.next_logits()
            if barred_V is not None:
                logits_BV = logits_BV.masked_fill(barred_V, -torch.inf)
            if temperature == 0:
                next_B = logits_BV.argmax(-1)
            else:
                uniform_B = _uniform(generator, len(prompts))[rows].to(logits_BV.device)
                next_B = sample(logits_BV, uniform_B, temperature, top_k, top_p)
            tokens = dict(zip(rows, next_B.tolist(), strict=True))
            ended = {row for row, token in tokens.items() if token == eos or (stop is not None and stop(row, token))}
            yield tokens
            if len(ended) == len(rows):
                return
            reader.append(list(tokens.values()))
            reader.select([index for index, row in enumerate(rows) if row not in ended])
            rows = [row for row in rows if row not in ended]

    return steps()


def sample(
    logits_BV: Tensor,
    uniform_B: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Sample a token for each row: the first at which the cumulative probability reaches a uniform draw.

    Tokens are ordered by probability, the most likely one first.

    Args:
        logits_BV: float32 `[B, V]`.
        uniform_B: uniform draws in [0, 1), float32 `[B]`.
        temperature: above 0; see `generate_stream`, also for the arguments below.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the smallest set of tokens whose probabilities sum to p.

    Returns:
        int64 `[B]`.
    """
    logits, tokens = logits_BV.topk(min(top_k or logits_BV.shape[-1], logits_BV.shape[-1]))
    # the difference first: a tiny temperature then gives -inf, not inf
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(-1)
    if top_p is not None:
        # keep a token if those before it have not reached p: the most likely one always stays
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    cumulative = probabilities.cumsum(-1)
    # the first token to reach the draw: never one of probability 0, whatever the rounding
    index_B1 = torch.searchsorted(cumulative, uniform_B[:, None] * cumulative[:, -1:])
    return tokens.gather(-1, index_B1)[:, 0]


class _Reader:
    """The logits after each row's window; with a cache, if `max_new_tokens` gives the tokens to make room for."""

    def __init__(self, model: LanguageModel, windows: list[list[int]], max_new_tokens: int | None) -> None:
        self.model, self.windows = model, windows
        self.context = model.config.context
        self.cache: KVCache | None = None
        self.cache_length = None
        if max_new_tokens is not None:
            self.cache_length = min(self.context, max(map(len, windows)) + max_new_tokens)

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """float32 `[B, V]`."""
        if self.cache is not None:
            hidden_BC = self._read_on(self.cache)
        else:
            hidden_BC = self._read_prompts() if self.cache_length else self._read(self.windows)
        logits_BV = (hidden_BC @ self.model.head_weight.T).float()
        if not bool(logits_BV.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite: its weights are not, or are out of range")
        return logits_BV

    def append(self, tokens: list[int]) -> None:
        """Append a token to each window."""
        for window, token in zip(self.windows, tokens, strict=True):
            window.append(token)
            if len(window) > self.context:
                del window[: -max(1, self.context // 2)]

    def select(self, rows: list[int]) -> None:
        """Continue with these rows only."""
        self.windows = [self.windows[row] for row in rows]
        if self.cache is not None:
            self.cache.select(rows)

    def _read(self, windows: Sequence[Sequence[int]], cache: KVCache | None = None) -> Tensor:
        """Hidden state of each window's last token, `[B, C]`. No token sees the padding, which is on the right."""
        lengths = [len(window) for window in windows]
        tokens_BT = pad_sequence([torch.tensor(window) for window in windows], batch_first=True)
        hidden_BTC = self.model.hidden(tokens_BT.to(self.model.embed.weight.device), cache=cache)
        if cache is not None:
            cache.lengths = lengths  # forgets the padding
        return hidden_BTC[range(len(lengths)), [length - 1 for length in lengths]]

    def _read_prompts(self) -> Tensor:
        distinct = {window: row for row, window in enumerate(dict.fromkeys(map(tuple, self.windows)))}
        rows = [distinct[tuple(window)] for window in self.windows]
        self.cache = KVCache(self.model.config, len(distinct), self.cache_length)
        hidden_BC = self._read(list(distinct), self.cache)
        self.cache.select(rows)
        return hidden_BC[rows]

    def _read_on(self, cache: KVCache) -> Tensor:
        """Hidden state of each window's newest token; windows that have started anew are read from their beginning."""
        anew = [row for row, window in enumerate(self.windows) if len(window) <= cache.lengths[row]]
        if anew:
            beginnings = [self.windows[row][:-1] for row in anew]
            part = KVCache(self.model.config, len(anew), self.context // 2)
            if beginnings[0]:
                self._read(beginnings, part)
            cache.put(anew, part)
        newest_B1 = torch.tensor([window[-1:] for window in self.windows], device=self.model.embed.weight.device)
        return self.model.hidden(newest_B1, cache=cache)[:, 0]


def _uniform(generator: Generators, rows: int) -> Tensor:
    """A draw for each row, in [0, 1)."""
    if isinstance(generator, Sequence):
        return torch.cat([_uniform(one, 1).cpu() for one in generator])
    return torch.rand(rows, generator=generator, device=None if generator is None else generator.device)


def _check_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
