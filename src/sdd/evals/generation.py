"""Texts continued by a trained run, for `sdd generate`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sdd.data import Tokenizer
from sdd.errors import UserError
from sdd.evals.text import TrainedRun, tokenizer_of
from sdd.evals.text_stream import TextStream
from sdd.models import generate_stream
from sdd.train.parallel import pick_autocast

_log = logging.getLogger(__name__)

#: Why a text ended: "stop" at an end of text or a stop string, "length" after the requested number of tokens.
FinishReason = Literal["stop", "length"]
#: Called with the index of a continuation and its new text; with the last piece, also why the text ended.
TextListener = Callable[[int, str, FinishReason | None], None]


@dataclass(frozen=True)
class Continuation:
    """One sample of one prompt.

    Attributes:
        prompt: the text before it.
        sample: number of the sample among those of its prompt, from 0.
        seed: seed of its random draws.
        text: the text that the model added, without the stop string.
        tokens: number of tokens drawn, with those of the stop string and the end of text.
        finish_reason: why the text ended.
    """

    prompt: str
    sample: int
    seed: int
    text: str
    tokens: int
    finish_reason: FinishReason


@dataclass
class _Row:
    """A continuation that is being generated."""

    prompt: str
    ids: list[int]
    sample: int
    seed: int
    stream: TextStream
    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None

    def push(self, token: int, eos: int | None, max_new_tokens: int) -> str:
        """Add a token and return its new text; after the last token, `finish_reason` is set."""
        self.tokens += 1
        piece = "" if token == eos else self.stream.push(token)
        if token == eos or self.stream.stopped:
            self.finish_reason = "stop"
        elif self.tokens == max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"
        self.text += piece
        return piece


def continue_texts(
    trained: TrainedRun,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    samples: int = 1,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    listener: TextListener | None = None,
    **sampling: Any,
) -> Iterator[Continuation]:
    """Continue each prompt with text that the model draws.

    Sample j of a prompt has a random generator of its own, seeded with `seed + j`. So up to rounding it does not depend
    on the other prompts and samples. Only ids with text and the end of text are drawn.

    Args:
        trained: the run.
        prompts: texts to continue.
        max_new_tokens: the most tokens to add; a text may end earlier, at an end of text or a stop string.
        samples: number of continuations of each prompt.
        seed: seed of the first sample.
        stop: strings that end a text and are not part of it.
        batch_size: number of continuations that are computed at once.
        listener: called with each new piece of text as soon as it is known.
        **sampling: temperature, top_k and top_p, see `sdd.models.generate_stream`.

    Yields:
        The continuations in the order of the prompts, the samples of a prompt in their order. They come batch by batch.

    Raises:
        UserError: if the run has no tokenizer, or a prompt is empty.
        ValueError: if a setting is out of range.
        FloatingPointError: if the model's logits are not finite.
    """
    tokenizer = tokenizer_of(trained.config)
    allowed = torch.from_numpy(tokenizer.writable(trained.config.model.vocab_size))
    rows = []
    for prompt in prompts:
        ids = _encode(tokenizer, prompt, trained.config.model.context)
        rows += [
            _Row(prompt, ids, sample, seed + sample, TextStream(tokenizer.decode, ids, stop))
            for sample in range(samples)
        ]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        _run_batch(trained, batch, first, max_new_tokens, tokenizer.eos, listener, {**sampling, "allowed": allowed})
        for row in batch:
            assert row.finish_reason is not None
            yield Continuation(row.prompt, row.sample, row.seed, row.text, row.tokens, row.finish_reason)


def _encode(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    if not prompt:
        raise UserError("the prompt is empty: give at least one character to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} is not Unicode text: give it in UTF-8") from None
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"the prompt {prompt!r} gives no token of the run's tokenizer")
    if len(ids) > context:
        _log.warning("the prompt has %s tokens: the model reads the last %s, its context", len(ids), context)
    return ids


def _run_batch(
    trained: TrainedRun,
    rows: list[_Row],
    first: int,
    max_new_tokens: int,
    eos: int | None,
    listener: TextListener | None,
    sampling: dict[str, Any],
) -> None:
    def ends(index: int, token: int) -> bool:
        row = rows[index]
        piece = row.push(token, eos, max_new_tokens)
        if listener is not None:
            listener(first + index, piece, row.finish_reason)
        return row.finish_reason is not None

    device = trained.model.embed.weight.device
    dtype = pick_autocast(trained.config.precision, device)
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    # around all steps: autocast keeps its copies of the weights until it ends
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        prompts = [row.ids for row in rows]
        for _ in generate_stream(trained.model, prompts, max_new_tokens, stop=ends, generator=generators, **sampling):
            pass
