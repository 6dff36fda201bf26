"""Tokenizers of every kind, trained on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sdd.data import Tokenizer

CORPUS = [
    "It was the best of times, it was  the worst of times.\n\n\tCall me Ishmael; don't.",
    "1941 99 __init__(self):\n    return x</s><0x0A>[EOS][UNK]<unk>",
    "中文没有空格的文字，日本語も。 héllo wörld naïve",
] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def of_backend(backend: Backend) -> Tokenizer:
    return of_spec(json.loads(backend.to_str()))


def of_spec(spec: dict[str, Any]) -> Tokenizer:
    return Tokenizer(Path("tokenizer.json"), json.dumps(spec).encode())


def byte_level(prefix: bool = False, regex: bool = True, **trainer: Any) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    backend.decoder = decoders.ByteLevel()
    trainer = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), **trainer}
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>"], show_progress=False, **trainer)
    )
    return backend


def metaspace(scheme: str, split: bool = True) -> Backend:
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=split)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *BYTES], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [added for added in spec["added_tokens"] if added["content"] in special]
    return Backend.from_str(json.dumps(spec))


def older_metaspace() -> Backend:
    """As written before `prepend_scheme`."""
    spec = json.loads(metaspace("always").to_str())
    older = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}
    return Backend.from_str(
        json.dumps(
            {
                **spec,
                "pre_tokenizer": older,
                "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, older]},
            }
        )
    )


def llama() -> Backend:
    backend = metaspace("always")
    spec = json.loads(backend.to_str())
    backend = Backend.from_str(json.dumps({**spec, "pre_tokenizer": None}))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def unigram(scheme: str) -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    spec = json.loads(backend.to_str())
    spec["model"]["byte_fallback"] = True
    spec["model"]["vocab"] += [[byte, -20.0] for byte in BYTES]
    return Backend.from_str(json.dumps(spec))


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_level() -> Backend:
    backend = Backend(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


#: Those that give every text back.
LOSSLESS: dict[str, Callable[[], Backend]] = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda: byte_level(prefix=True),
    "byte-level, whole text": lambda: byte_level(regex=False),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "metaspace, whole text": lambda: metaspace("always", split=False),
    "metaspace, older": older_metaspace,
    "Llama": llama,
    "unigram, always": lambda: unigram("always"),
    "unigram, never": lambda: unigram("never"),
}
ALL = {**LOSSLESS, "WordPiece": word_piece, "WordLevel": word_level}
