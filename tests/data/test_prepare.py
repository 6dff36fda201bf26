from pathlib import Path

import pytest

from sdd.data import TokenFile, Tokenizer, builtin_tokenizer, prepare, text, tokenize_files
from sdd.errors import UserError


def test_memory_is_bounded_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "long.txt"
    source.write_text("some words of a line\n" * 20_000)
    monkeypatch.setattr(text, "PIECE_BYTES", 1000)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 5000)
    batches: list[int] = []
    encode = Tokenizer.encode_batch

    def record(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        batches.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", record)
    tokenize_files([source], tmp_path, builtin_tokenizer())
    assert max(batches) < 5000 + 1000
    train, validation = TokenFile.open(tmp_path / "train.npy"), TokenFile.open(tmp_path / "validation.npy")
    assert train.info.n_documents == validation.info.n_documents == 1
    joined = [*train.tokens[:-1], *validation.tokens[:-1]]
    assert joined == builtin_tokenizer().encode(source.read_text())
    assert builtin_tokenizer().decode(joined) == source.read_text()


def test_nothing_held_out_on_request(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a b c")
    tokenize_files([tmp_path / "a.txt"], tmp_path, builtin_tokenizer(), validation_fraction=0)
    assert builtin_tokenizer().decode(TokenFile.open(tmp_path / "train.npy").tokens) == "a b c"
    assert not (tmp_path / "validation.npy").exists()


def test_too_little_to_part(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"a\.txt: too little text"):
        tokenize_files([tmp_path / "a.txt"], tmp_path, builtin_tokenizer())
    assert not list(tmp_path.glob("*.npy"))
