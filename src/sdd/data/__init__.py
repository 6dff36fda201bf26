"""Data: text and tokenizers, token files, mixtures, and the loader that computes which tokens make batch s."""

from sdd.data.cache import Notify
from sdd.data.loader import Loader, eval_windows, permute
from sdd.data.mixture import MixturePart
from sdd.data.source import DataSource, classics, resolve_data
from sdd.data.token_file import TokenFile, TokenInfo, TokenizerRef, write_tokens
from sdd.data.tokenize_job import TokenizeSettings, tokenize
from sdd.data.tokenizer import Tokenizer, builtin_tokenizer

__all__ = [
    "DataSource",
    "Loader",
    "MixturePart",
    "Notify",
    "TokenFile",
    "TokenInfo",
    "TokenizeSettings",
    "Tokenizer",
    "TokenizerRef",
    "builtin_tokenizer",
    "classics",
    "eval_windows",
    "permute",
    "resolve_data",
    "tokenize",
    "write_tokens",
]
