import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdd.data import Loader, TokenFile, TokenInfo, TokenizerRef, resolve_data, write_tokens
from sdd.data.token_file import smallest_dtype
from sdd.errors import BadData, UserError

EOS = 0


def write(path: Path, documents: list[list[int]], vocab_size: int = 100) -> TokenFile:
    reference = TokenizerRef(sha256="abc")
    info = TokenInfo(dtype=smallest_dtype(vocab_size), eos=EOS, vocab_size=vocab_size, tokenizer=reference)
    return write_tokens(path, ([*ids, EOS] for ids in documents), info)


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return write(tmp_path / "train.npy", [list(range(1, 60)), [7, 8]])


@given(
    st.sampled_from([2**16, 2**16 + 1, 2**31]).flatmap(
        lambda v: st.tuples(st.just(v), st.lists(st.lists(st.integers(1, v - 1)), min_size=1))
    )
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, drawn: tuple[int, list[list[int]]]):
    vocab_size, documents = drawn
    path = tmp_path_factory.mktemp("tokens") / "train.npy"
    file = write(path, documents, vocab_size)
    expected = [token for ids in documents for token in [*ids, EOS]]
    assert file.tokens.tolist() == expected
    assert file.read([0], len(file)).tolist() == [expected]
    assert path.stat().st_size == len(expected) * (2 if vocab_size == 2**16 else 4)  # no header
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "format": 1,
        "dtype": "uint16" if vocab_size == 2**16 else "uint32",
        "n_tokens": len(expected),
        "n_bytes": None,
        "n_documents": None,
        "eos": EOS,
        "vocab_size": vocab_size,
        "tokenizer": {"sha256": "abc", "file": None},
    }
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.json", "train.npy"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, file: TokenFile):
    with pytest.raises(UserError, match="token id 100 is outside the vocabulary of 100"):
        write(tmp_path / "train.npy", [[1, 2], [100]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.json", "train.npy"]
    assert TokenFile.open(tmp_path / "train.npy").tokens.tolist() == file.tokens.tolist()


def test_the_json_says_what_the_caller_knows(tmp_path: Path):
    info = TokenInfo(dtype="uint16", n_bytes=3, n_documents=1)
    assert write_tokens(tmp_path / "x.npy", [[1], np.array([2], np.uint16)], info).info == TokenInfo(
        dtype="uint16", n_bytes=3, n_documents=1, n_tokens=2
    )


def test_no_tokens_make_no_file(tmp_path: Path):
    with pytest.raises(UserError, match="no tokens to write"):
        write_tokens(tmp_path / "x.npy", [[]], TokenInfo(dtype="uint16"))
    assert not list(tmp_path.iterdir())


def test_an_id_that_the_dtype_cannot_hold_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="token id 65536 is outside the vocabulary of 65536 tokens"):
        write_tokens(tmp_path / "x.npy", [[2**16]], TokenInfo(dtype="uint16"))


@given(st.integers(0, 125))
def test_a_file_cut_off_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, size: int):
    path = tmp_path_factory.mktemp("tokens") / "train.npy"
    write(path, [list(range(1, 60)), [7, 8]])
    data = path.read_bytes()
    assert len(data) == 126
    path.write_bytes(data[:size])
    with pytest.raises(UserError, match=r"empty|no multiple|holds"):
        TokenFile.open(path)


def test_a_mismatch_names_both_numbers(file: TokenFile):
    file.path.write_bytes(file.path.read_bytes() * 2)
    with pytest.raises(UserError, match=r"holds 126 uint16 tokens, but train\.json says 63"):
        TokenFile.open(file.path)


def test_without_json_the_dtype_is_needed_and_enough(file: TokenFile):
    expected = file.tokens.tolist()
    file.path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="pass dtype"):
        TokenFile.open(file.path)
    bare = TokenFile.open(file.path, dtype="uint16", eos=EOS, vocab_size=100)
    assert (bare.tokens.tolist(), bare.eos, bare.vocab_size, bare.info.n_bytes) == (expected, EOS, 100, None)
    with pytest.raises(UserError, match="dtype float32: expected uint16 or uint32"):
        TokenFile.open(file.path, dtype="float32")


@pytest.mark.parametrize("given_", [{"dtype": "uint32"}, {"eos": 5}, {"vocab_size": 3}])
def test_what_the_caller_says_may_not_contradict_the_json(file: TokenFile, given_: dict):
    with pytest.raises(UserError, match="says"):
        TokenFile.open(file.path, **given_)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"dtype": "int8"}', '{"dtype": "uint16", "format": 2}'])
def test_a_bad_json_is_refused(file: TokenFile, text: str):
    file.path.with_suffix(".json").write_text(text)
    with pytest.raises(UserError, match=r"train\.json") as caught:
        TokenFile.open(file.path)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_found_when_read(file: TokenFile):
    small = TokenFile(file.path, file.tokens, file.info.model_copy(update={"vocab_size": 59}))
    assert small.read([0], 58).max() == 58
    with pytest.raises(BadData, match=r"holds token id 59, but its vocabulary has 59 tokens: .*position 58, counted"):
        small.read([0, 1], 59)


@given(st.integers(0, 2999), st.integers(1, 2999), st.sampled_from([7, 100, 4096]))
def test_one_bad_id_anywhere_is_found_with_its_position(place: int, first: int, block: int):
    tokens = np.zeros(3000, np.uint16)
    tokens[place] = 60_000
    info = TokenInfo(dtype="uint16", vocab_size=60_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdd.data.token_file._CHECKED_TOKENS", block)
        part = TokenFile(Path("x.npy"), tokens, info).slice(first, 3000)
        if place < first:
            part.check_ids()
            return
        with pytest.raises(UserError, match=rf"token id 60000, .* \(position {place:,}, counted from 0\)"):
            part.check_ids()


def test_of_a_long_file_as_many_tokens_are_looked_at_from_end_to_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdd.data.token_file._CHECKED_TOKENS", 10)
    monkeypatch.setattr("sdd.data.token_file._CHECKED_BLOCKS", 5)
    for place in (0, 999):
        tokens = np.zeros(1000, np.uint16)
        tokens[place] = 9
        with pytest.raises(UserError, match=f"position {place},"):
            TokenFile(Path("x.npy"), tokens, TokenInfo(dtype="uint16", vocab_size=9)).check_ids()


@pytest.mark.parametrize("dtype", ["uint16", "uint32", ">u4"])
def test_a_real_npy_with_header_is_read(tmp_path: Path, dtype: str):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(50, dtype=dtype))
    file = TokenFile.open(path, vocab_size=50)
    assert file.read([1], 49).tolist() == [list(range(1, 50))]
    assert len(file) == 50


@pytest.mark.parametrize("array", [np.zeros((3, 2), np.uint16), np.zeros(3), np.zeros(0, np.uint16)])
def test_a_real_npy_of_something_else_is_refused(tmp_path: Path, array: np.ndarray):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=r"x\.npy"):
        TokenFile.open(tmp_path / "x.npy")


@given(st.integers(0, 200))
def test_a_damaged_npy_header_is_refused(tmp_path_factory: pytest.TempPathFactory, size: int):
    path = tmp_path_factory.mktemp("tokens") / "x.npy"
    np.save(path, np.arange(40, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"x\.npy"):
        TokenFile.open(path)


def test_a_slice_is_a_view_that_knows_what_still_holds(file: TokenFile):
    part = file.slice(10, 20)
    assert part.tokens.tolist() == list(range(11, 21))
    assert np.shares_memory(part.tokens, file.tokens)
    assert (len(part), part.info.n_tokens, part.info.n_bytes, part.eos) == (10, 10, None, EOS)
    assert part.read([2], 3).tolist() == [[13, 14, 15]]


def test_the_fingerprint_knows_content_not_layout(tmp_path: Path, file: TokenFile):
    wide = write(tmp_path / "wide.npy", [list(range(1, 60)), [7, 8]], vocab_size=2**20)
    other = write(tmp_path / "other.npy", [list(range(1, 60)), [7, 9]])
    assert file.fingerprint() == wide.fingerprint() != other.fingerprint()
    assert file.fingerprint() != file.slice(0, 62).fingerprint()


def test_no_file(tmp_path: Path):
    with pytest.raises(UserError, match="no token file"):
        TokenFile.open(tmp_path / "none.npy")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
json_fields = st.sampled_from([*TokenInfo.model_fields, "unknown"])
fuzzed_info = st.one_of(
    st.binary(max_size=60),
    json_values.map(json.dumps).map(str.encode),
    st.dictionaries(json_fields, json_values).map(lambda d: json.dumps({"dtype": "uint16", **d}).encode()),
    st.text(max_size=300).map(lambda name: json.dumps({"dtype": "uint16", "tokenizer": {"sha256": "x", "file": name}})),
)


@example(b'{"dtype": "uint16", "tokenizer": {"sha256": "", "file": "../tokenizer.json"}}')
@example(b'{"dtype": "uint16", "tokenizer": {"sha256": "", "file": "a\\u0000b"}}')
@example(b'{"dtype": "uint16", "tokenizer": {"sha256": "", "file": "' + b"a" * 256 + b'"}}')
@example(b"[" * 100_000)
@example(b'{"dtype": "uint16", "eos": 7, "vocab_size": 7}')
@example(b'{"dtype": "uint16", "vocab_size": 1' + b"0" * 5000 + b"}")
@given(fuzzed_info)
def test_a_fuzzed_json_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, info: bytes | str):
    path = tmp_path_factory.mktemp("fuzz") / "train.npy"
    np.arange(200, dtype=np.uint16).tofile(path)
    path.with_suffix(".json").write_bytes(info.encode() if isinstance(info, str) else info)
    try:
        source = resolve_data(path, context=8, vocab_size=300)
        assert Loader(source.parts, 2, 8).batch(0).shape == (2, 9)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1500


npy_headers = st.text("{}[]()'descrfotan_shp: ,<u24OTrueFls1-+*.#\\\n\t ", max_size=120)


@example("{'descr': '|O', 'fortran_order': False, 'shape': (20,), }")
@example("{'descr': '<u2', 'fortran_order': False, 'shape': (-20,), }")
@example("{'descr': '|V0', 'fortran_order': False, 'shape': (20,), }")
@example("__import__('os').system('false')")
@example("(" * 500)
@given(npy_headers)
def test_a_fuzzed_npy_header_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, header: str):
    path = tmp_path_factory.mktemp("fuzz") / "train.npy"
    text = header.encode("latin1")
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(40))
    try:
        assert len(TokenFile.open(path)) == 20
    except UserError as error:
        assert "\n" not in str(error)


def test_what_may_not_be_read_is_one_line(tmp_path: Path, file: TokenFile, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "train.json"))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*train\.json: Permission denied"):
        TokenFile.open(file.path)
