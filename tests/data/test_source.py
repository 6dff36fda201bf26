import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.data import Loader, TokenWriter, builtin_tokenizer, resolve_data, tokenize_files
from sdd.errors import UserError

PROSE = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 400)
    return path


@pytest.fixture
def tokens(tmp_path: Path, prose: Path) -> Path:
    out = tmp_path / "tokens"
    out.mkdir()
    tokenize_files([prose], out, builtin_tokenizer())
    return out


@pytest.mark.parametrize("spec", [None, "classics"])
def test_the_built_in_corpus(spec: str | None):
    source = resolve_data(spec, context=128)
    assert (source.name, source.vocab_size, source.eos) == ("classics", 4096, 0)
    assert source.n_tokens > 4_000_000
    assert source.tokenizer is builtin_tokenizer()
    assert Loader(source.train, 4, 128).batch(0).shape == (4, 129)


def test_a_text_file_is_tokenised_once(prose: Path):
    notes: list[str] = []
    source = resolve_data(prose, context=32, notify=notes.append)
    again = resolve_data(str(prose), context=32, notify=notes.append)
    assert len(notes) == 1
    assert "prose" in notes[0]
    assert source.fingerprint() == again.fingerprint()
    decode = builtin_tokenizer().decode
    assert decode(source.train[0].tokens) + decode(source.validation.tokens) == PROSE * 400
    prose.write_text(PROSE * 401)
    assert resolve_data(prose, context=32).fingerprint() != source.fingerprint()


def test_several_texts_and_directories_of_text(tmp_path: Path, prose: Path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.md").write_text(PROSE * 100)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": PROSE * 10}) + "\n" for _ in range(10)))
    (folder / "empty.txt").write_text("")
    (folder / "image.png").write_bytes(b"\xff\x00")
    assert resolve_data(folder, context=32).train[0].info.n_documents == 11
    source = resolve_data(f"{prose}, {folder}", context=32)
    assert source.name == "prose+1"
    assert source.train[0].info.n_documents == 12
    comma = tmp_path / "a,b.txt"
    shutil.copy(prose, comma)
    assert resolve_data(comma, context=32).name == "a,b"


def test_text_with_another_tokenizer(tmp_path: Path, prose: Path):
    spec = json.loads(builtin_tokenizer().path.read_bytes())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 4096, "content": "<extra>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    source = resolve_data(prose, tmp_path / "tokenizer.json", context=32)
    assert source.vocab_size == 4097
    assert source.tokenizer
    assert source.tokenizer.sha256 != builtin_tokenizer().sha256
    with pytest.raises(UserError, match="was made with tokenizer"):
        resolve_data(source.train[0].path, builtin_tokenizer().path, context=32)
    found = resolve_data(source.train[0].path, context=32)  # by the copy beside the tokens
    assert found.tokenizer
    assert found.tokenizer.sha256 == source.tokenizer.sha256


@pytest.mark.parametrize("what", ["directory", "file", "list"])
def test_token_files_with_validation(tokens: Path, what: str):
    spec = {"directory": tokens, "file": tokens / "train.npy", "list": f"{tokens}/train.npy,{tokens}/validation.npy"}
    source = resolve_data(spec[what], context=32)
    assert [file.path for file in source.train] == [tokens / "train.npy"]
    assert source.validation.path == tokens / "validation.npy"
    assert source.tokenizer is builtin_tokenizer()
    assert (source.vocab_size, source.eos) == (4096, 0)


@given(st.integers(1, 40), st.integers(0, 6000))
def test_without_validation_the_last_windows_are_held_out(
    tmp_path_factory: pytest.TempPathFactory, context: int, more: int
):
    n_tokens = 2 * (context + 1) + more
    path = tmp_path_factory.mktemp("tokens") / "part.npy"
    with TokenWriter(path, n_tokens, None) as writer:
        writer.write(np.arange(n_tokens))
    source = resolve_data(path, context=context)
    assert [*source.train[0].tokens, *source.validation.tokens] == list(range(n_tokens))
    windows = source.validation.n_windows(context)
    assert windows == max(1, (n_tokens - 1) // context // 100)
    assert len(source.validation) == windows * context + 1


def test_token_files_without_json(tokens: Path):
    for file in tokens.glob("*.json"):
        file.unlink()
    with pytest.raises(UserError, match="pass dtype"):
        resolve_data(tokens, context=32)
    with pytest.raises(UserError, match="name the tokenizer"):
        resolve_data(tokens, context=32, dtype="uint16")
    source = resolve_data(tokens, builtin_tokenizer().path, context=32, dtype="uint16")
    assert (source.vocab_size, source.eos) == (4096, 0)
    assert source.validation.vocab_size == 4096


def test_token_files_of_two_vocabularies(tmp_path: Path):
    for name, size in (("a.npy", 50), ("b.npy", 60)):
        with TokenWriter(tmp_path / name, size, 0) as writer:
            writer.write(np.arange(40))
    with pytest.raises(UserError, match="files of one run need one tokenizer"):
        resolve_data(tmp_path, context=8)


def test_what_does_not_exist_is_answered_with_what_does(tmp_path: Path, prose: Path):
    with pytest.raises(UserError, match=r"did you mean prose\.txt\?"):
        resolve_data(tmp_path / "pros.txt", context=8)
    with pytest.raises(UserError, match="did you mean classics"):
        resolve_data("clasics", context=8)
    with pytest.raises(UserError, match=r"no data at .*: expected classics, token files"):
        resolve_data(tmp_path / "nowhere" / "zzz", context=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a few words", "too little"),
        (PROSE.encode() * 8, "validation part has .* context of 64 needs 65"),
    ],
)
def test_unusable_text_is_one_clear_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        resolve_data(path, context=64)
    assert "\n" not in str(caught.value)


def test_directories_without_data_and_mixtures(tmp_path: Path, prose: Path, tokens: Path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="neither token files"):
        resolve_data(tmp_path / "nothing", context=8)
    with pytest.raises(UserError, match=r"mixes token files \(train\.npy\) and text \(prose\.txt\)"):
        resolve_data(f"{prose},{tokens}", context=8)
    with pytest.raises(UserError, match=r"at most one validation\.npy"):
        resolve_data(tokens / "validation.npy", context=8)
