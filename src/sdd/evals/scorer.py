"""What a model must offer to be scored on texts, and how a trained run offers it.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sdd.data import Tokenizer
from sdd.errors import UserError
from sdd.evals.text import TrainedRun, tokenizer_of
from sdd.train.parallel import pick_autocast


class Scorer(Protocol):
    """A language model with its tokenizer.

    Attributes:
        key: identifies weights, tokenizer and precision: scores under another key may differ.
        context: the most tokens that it reads at once.
        vocab_size: the width of its logits.
        start: the token that stands before a text without context; None if the tokenizer has no end of text.
        tokenizer: gives the bytes of the tokens; None if it cannot.
    """

    key: str
    context: int
    vocab_size: int
    start: int | None
    tokenizer: Tokenizer | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as it stands at the beginning of what the model reads."""
        ...

    def logits(self, tokens_BT: Tensor, first: int) -> Tensor:
        """The logits after positions `first`, `first + 1`, ..., float32 `[B, T - first, V]`; padding is at the end."""
        ...


class RunScorer:
    """A trained run as a `Scorer`; device and precision are those of its config.

    Raises:
        UserError: if the run has no tokenizer.
    """

    def __init__(self, trained: TrainedRun) -> None:
        self._model = trained.model
        self._device = trained.model.embed.weight.device
        self._autocast = pick_autocast(trained.config.precision, self._device)
        tokenizer = tokenizer_of(trained.config)
        self.tokenizer: Tokenizer | None = tokenizer
        self.start = tokenizer.eos
        self.context, self.vocab_size = trained.config.model.context, trained.config.model.vocab_size
        self._document_eos = self.start if trained.config.data.document_mask else None
        self._encode = tokenizer.encode_batch
        self.key = digest(
            file_digest(trained.checkpoint / "state.json") if trained.checkpoint else trained.step,
            tokenizer.identity,
            self._autocast,
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; nothing is put around it."""
        return self._encode(texts)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, first: int) -> Tensor:
        """See `Scorer.logits`. Where the run was trained with a document mask, its attention has it here too."""
        tokens_BT = tokens_BT.to(self._device)
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            if self._document_eos is not None and bool((tokens_BT == self._document_eos).any()):
                found = self._model(tokens_BT, document_eos=self._document_eos)
                assert isinstance(found, Tensor)
                return found[:, first:].float()
            return F.linear(self._model.hidden(tokens_BT)[:, first:], self._model.head_weight).float()


def digest(*parts: object) -> str:
    """A hash of what these say."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """A hash of a file's bytes.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
