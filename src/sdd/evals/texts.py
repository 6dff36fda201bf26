"""Texts to evaluate on, in every kind of file that is trained on."""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from sdd.data.inputs import documents, find_inputs
from sdd.data.text import check_utf8
from sdd.errors import UserError

_log = logging.getLogger(__name__)
_BATCH = 256  # documents that are tokenised at once


def read_texts(name: str, field: str = "text") -> list[str]:
    """The documents of a file, a folder or a dataset.

    Args:
        name: text, JSON lines, parquet, a folder of these, or hf:NAME[:SPLIT], as `sdd tokenize` reads them.
        field: of JSON lines, parquet and datasets.

    Raises:
        UserError: if it cannot be read, is of another kind, or lacks the field.
    """
    found, lacking = [], 0
    for source in find_inputs([name], field):
        for _, document in documents(source, field):
            if document is None:
                lacking += 1
                continue
            document.file.seek(0)
            data = document.file.read(document.size)
            check_utf8(data, document.name)
            found.append(data.decode())
    if lacking:
        _log.warning("%s: %s records have no text and do not count", name, f"{lacking:,}")
    return found


def token_ids(
    texts: Sequence[str], name: str, encode: Callable[[Sequence[str]], list[list[int]]], end: int | None
) -> np.ndarray:
    """The tokens of texts one after the other, int64, with the end of text between two of them.

    Raises:
        UserError: if there is more than one text and no end of text.
    """
    if len(texts) > 1 and end is None:
        raise UserError(f"{name} holds {len(texts):,} documents, and the tokenizer has no end of text to part them")
    parts: list[list[int]] = []
    for first in range(0, len(texts), _BATCH):
        for ids in encode(texts[first : first + _BATCH]):
            parts += [[end], ids] if parts and end is not None else [ids]
    return np.concatenate([np.array(part, np.int64) for part in parts]) if parts else np.zeros(0, np.int64)
