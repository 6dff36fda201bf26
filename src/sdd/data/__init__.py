"""Data: corpora, tokenizers, token files, and the loader that says which tokens make batch s."""

from sdd.data.cache import Notify
from sdd.data.corpora import builtin_tokenizer, classics
from sdd.data.loader import Loader, eval_windows, permute
from sdd.data.mixture import Part
from sdd.data.prepare import cached_token_files, tokenize_files
from sdd.data.source import DataSource, resolve_data
from sdd.data.token_file import TokenFile, TokenInfo, TokenizerRef, TokenWriter
from sdd.data.tokenize_job import TokenizeSettings, tokenize
from sdd.data.tokenizer import Tokenizer

__all__ = [
    "DataSource",
    "Loader",
    "Notify",
    "Part",
    "TokenFile",
    "TokenInfo",
    "TokenWriter",
    "TokenizeSettings",
    "Tokenizer",
    "TokenizerRef",
    "builtin_tokenizer",
    "cached_token_files",
    "classics",
    "eval_windows",
    "permute",
    "resolve_data",
    "tokenize",
    "tokenize_files",
]
