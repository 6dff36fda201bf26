"""The corpus and the tokenizer that come with the package, so that the first run needs no network.

The classics are English prose of four kinds: State of the Union addresses, Moby Dick, five Jane Austen novels, the
King James Bible (sources and licences in assets/README.md). Held out is the last 5% of each document, by the rule
that holds for all text, `sdd.data.text.TailSplit`. Of the addresses, 221 documents in the order of time, this is on
purpose not the last 5% of them all: those are the most recent, and the loss on them would measure two centuries of
change in the language beside what the model has learned. Tails of all eras have the training text's distribution.
"""

import functools
from pathlib import Path

from sdd.data.cache import Notify
from sdd.data.prepare import cached_token_files
from sdd.data.token_file import TokenFile
from sdd.data.tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "assets"
CLASSICS = ASSETS / "classics.jsonl.zst"
CLASSICS_TOKENIZER = ASSETS / "classics-bpe.json"


@functools.cache
def builtin_tokenizer() -> Tokenizer:
    """The byte-level BPE of 4096 tokens trained on the classics' training part; `<|endoftext|>` is token 0."""
    return Tokenizer.load(CLASSICS_TOKENIZER)


def classics(tokenizer: Tokenizer | None = None, notify: Notify | None = None) -> tuple[TokenFile, TokenFile]:
    """Training and validation tokens of the classics, tokenised on first use (seconds) and kept in the cache.

    Args:
        tokenizer: the built-in one by default.
        notify: receives one line when there is work to do; by default it is logged.
    """
    return cached_token_files("classics", [CLASSICS], tokenizer or builtin_tokenizer(), notify)
