import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sdd.data import TokenFile, Tokenizer, builtin_tokenizer

SENTENCES = ("It was the best of times.", "Call me Ishmael.", "Happy families — all alike!", "A spectre is haunting.")


def some_documents(n: int, seed: int = 0) -> list[str]:
    """Documents of one to forty short lines."""
    random = np.random.default_rng(seed)
    return ["\n".join(random.choice(SENTENCES, random.integers(1, 40))) + f"\n{i}" for i in range(n)]


def write_jsonl(path: Path, documents: Iterable[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in documents))
    return path


def texts_of(files: Sequence[Path], tokenizer: Tokenizer | None = None) -> list[str]:
    """The documents in token files, told apart by their end-of-text tokens."""
    tokenizer = tokenizer or builtin_tokenizer()
    texts = []
    for path in files:
        file = TokenFile.open(path)
        ends = np.flatnonzero(file.tokens == file.eos)
        assert ends[-1] == len(file) - 1  # the last document has an end too
        texts += [tokenizer.decode(file.tokens[a:b]) for a, b in zip([0, *ends[:-1] + 1], ends, strict=True)]
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    """The files that training sees."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy")) + sorted(folder.glob("[tv]*-*.json"))}
