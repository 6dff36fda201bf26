import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from sdd.data import (
    DataSource,
    Loader,
    TokenInfo,
    Tokenizer,
    TokenizeSettings,
    builtin_tokenizer,
    resolve_data,
    tokenize,
    write_tokens,
)
from sdd.data.spec import absolute
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
    tokenize([str(prose)], out, TokenizeSettings(builtin_tokenizer(), validation_fraction=0.05))
    for suffix in (".npy", ".json"):
        (out / f"train-00000{suffix}").rename(out / f"train{suffix}")
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
    write_tokens(path, [np.arange(n_tokens)], TokenInfo(dtype="uint16", vocab_size=n_tokens))
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
        write_tokens(tmp_path / name, [np.arange(40)], TokenInfo(dtype="uint16", vocab_size=size, eos=0))
    with pytest.raises(UserError, match="files of one run need one tokenizer"):
        resolve_data(tmp_path, context=8)


def test_what_does_not_exist_is_answered_with_what_does(tmp_path: Path, prose: Path):
    with pytest.raises(UserError, match=r"did you mean prose\.txt\?"):
        resolve_data(tmp_path / "pros.txt", context=8)
    for far in ("poem.txt", "p.txt", "dose.txt"):
        with pytest.raises(UserError, match=f"no data at .*{far}: expected classics"):
            resolve_data(tmp_path / far, context=8)
    with pytest.raises(UserError, match="did you mean classics"):
        resolve_data("clasics", context=8)
    with pytest.raises(UserError, match=r"no data at .*: expected classics, token files"):
        resolve_data(tmp_path / "nowhere" / "zzz", context=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text to train on"),
        (b"a", r"x\.txt: too little text to train on and hold out a part"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a few words", "too little"),
        (
            PROSE.encode() * 8,
            "validation part of x: too little data, a context of 64 needs 65 tokens.*--validation-fraction",
        ),
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
    with pytest.raises(UserError, match=r"nothing holds no data, expected \.txt"):
        resolve_data(tmp_path / "nothing", context=8)
    with pytest.raises(UserError, match=r"mixes token files \(train\.npy\) and text \(prose\.txt\)"):
        resolve_data(f"{prose},{tokens}", context=8)
    with pytest.raises(UserError, match=r"at most one validation\.npy"):
        resolve_data(tokens / "validation.npy", context=8)


def test_files_of_others_are_read_given_dtype_eos_and_vocabulary(tmp_path: Path):
    ids = np.random.default_rng(0).integers(0, 50_000, 5000).astype(np.uint16)
    for name in ("train.bin", "val.bin", "corpus.u16"):
        ids.tofile(tmp_path / name)
    for spec in (tmp_path, tmp_path / "train.bin"):
        source = resolve_data(spec, context=8, dtype="uint16", eos=49_999, vocab_size=50_000)
        assert [file.path.name for file in source.train] == ["train.bin"]
        assert source.validation.path.name == "val.bin"
        assert (source.eos, source.vocab_size, source.tokenizer) == (49_999, 50_000, None)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "corpus.u16", alone)
    source = resolve_data(alone / "corpus.u16", context=8, dtype="uint16", vocab_size=50_000)
    assert [*source.train[0].tokens, *source.validation.tokens] == ids.tolist()
    with pytest.raises(UserError, match="eos 50000 is outside its vocabulary of 50000 tokens"):
        resolve_data(tmp_path, context=8, dtype="uint16", eos=50_000, vocab_size=50_000)
    with pytest.raises(UserError, match=r"token id 4\d{4}, but its vocabulary has 40000 tokens: wrong dtype"):
        resolve_data(tmp_path, context=8, dtype="uint16", vocab_size=40_000)


def test_dtype_and_eos_may_not_contradict(tokens: Path, prose: Path):
    with pytest.raises(UserError, match="the json says uint16, the caller says uint32: which is it"):
        resolve_data(tokens, context=8, dtype="uint32")
    with pytest.raises(UserError, match=r"eos 3 was given, but .*json says 0"):
        resolve_data(tokens, context=8, eos=3)
    with pytest.raises(UserError, match="text needs the token '3', it cannot end a text"):
        resolve_data(prose, context=8, eos=3)


@given(st.text(max_size=60))
@example("a\x00b")
@example("x" * 5000)
@example(",,,")
@example("a:1,b:2")
@example("\ud800")
def test_any_text_for_a_path_is_one_line(spec: str):
    try:
        resolve_data(f"/nonexistent/{spec}", context=8)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        pytest.fail(spec)


@given(st.lists(st.sampled_from(["classics", "a.npy", "b", "/c/d.npy"]), min_size=1, max_size=3), st.booleans())
def test_a_spec_made_absolute_is_the_same_from_anywhere(names: list[str], weighted: bool):
    spec = ",".join(f"{name}:0.5" if weighted else name for name in names)
    once = absolute(spec)
    assert absolute(once) == once
    expected = [name if name == "classics" else str(Path(name).absolute()) for name in names]
    assert once == ",".join(f"{name}:0.5" if weighted else name for name in expected)


def test_a_name_with_a_comma_or_a_number_after_a_colon_is_a_name_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c:2"):
        (tmp_path / name).write_text(PROSE * 100)
        assert absolute(name) == str(tmp_path / name)
        assert resolve_data(name, context=8).parts[0].weight == 1


def held(data: DataSource) -> list[list[int]]:
    return [file.tokens.tolist() for file in (*data.train, data.validation)]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.zst", "a.jsonl", "a.ndjson", "a.json.gz", "a.parquet"])
def test_a_text_gives_the_same_tokens_in_any_kind_of_file(tmp_path: Path, name: str):
    text = "".join(f"{i} {PROSE}" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    data = text.encode() if ".txt" in name or ".md" in name else json.dumps({"text": text}).encode()
    if name.endswith("parquet"):
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / name)
    else:
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        (tmp_path / name).write_bytes(compress(data))
    assert held(resolve_data(tmp_path / name, context=8)) == held(resolve_data(tmp_path / "a.txt", context=8))


def test_tokens_of_text_and_their_place_in_the_cache_stay_as_they_were(tmp_path: Path):
    """A run that was begun with an earlier version goes on with the same batches."""
    lines = [" ".join(f"word{(i * j) % 97}" for j in range(2 + i % 50)) for i in range(3000)]
    (tmp_path / "old.txt").write_text("\n".join(lines))
    (tmp_path / "old.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = resolve_data(f"{tmp_path}/old.txt,{tmp_path}/old.jsonl", context=8)
    tokens = hashlib.sha256(b"".join(file.tokens.tobytes() for file in (*data.train, data.validation)))
    assert tokens.hexdigest()[:16] == "136129ee1c0561a4"
    assert data.train[0].path.parent.name == "old+1-0edcd7ba0c08bc71"
    assert [entry["file"] for entry in data.listing] == ["old+1/train.npy", "held out/validation.npy"]


def test_the_end_of_text_is_named_where_a_tokenizer_has_none_of_the_usual(tmp_path: Path, prose: Path):
    spec = json.loads(builtin_tokenizer().path.read_bytes())
    spec["added_tokens"][0]["content"] = "<|stop|>"
    spec["model"]["vocab"] = {name.replace("endoftext", "stop"): i for name, i in spec["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"none of the usual end-of-text tokens .* with --data\.eos TOKEN"):
        resolve_data(prose, tmp_path / "tokenizer.json", context=32)
    with pytest.raises(UserError, match=r"has no token '<\|halt\|>' to end a text with"):
        resolve_data(prose, tmp_path / "tokenizer.json", context=32, eos="<|halt|>")
    usual = resolve_data(prose, context=32)
    for named in ("<|stop|>", 0):
        data = resolve_data(prose, tmp_path / "tokenizer.json", context=32, eos=named)
        assert data.eos == 0
        assert [*data.train[0].tokens] == [*usual.train[0].tokens]


def test_runs_go_on_with_text_that_was_tokenised_without_an_end(tmp_path: Path, prose: Path, monkeypatch):
    spec = json.loads(builtin_tokenizer().path.read_bytes())
    spec["added_tokens"][0]["content"] = "<|stop|>"
    spec["model"]["vocab"] = {name.replace("endoftext", "stop"): i for name, i in spec["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with monkeypatch.context() as earlier:  # a version that asked for none
        earlier.setattr(Tokenizer, "ending_with", lambda self, *_: self)
        before = resolve_data(prose, tmp_path / "tokenizer.json", context=32)
    said: list[str] = []
    data = resolve_data(prose, tmp_path / "tokenizer.json", context=32, notify=said.append)
    assert data.eos is None
    assert data.fingerprint() == before.fingerprint()
    assert "joined without an end-of-text token" in said[0]


def test_a_dataset_is_to_be_tokenised_first():
    with pytest.raises(
        UserError, match=r"no data at .*: a dataset has to become token files first: sdd tokenize hf:a/b"
    ):
        resolve_data("hf:a/b", context=8)
