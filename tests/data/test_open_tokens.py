import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.data import Loader, TokenFile, TokenInfo, resolve_data, write_tokens
from sdd.data.token_file import OpenTokens
from sdd.errors import RunFailed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "train.npy", [np.arange(50_000)], TokenInfo(dtype="uint16", vocab_size=60_000)).path


@given(st.integers(0, 7), st.integers(1, 200), st.data())
def test_parts_of_parts_are_what_slices_are(
    tmp_path_factory: pytest.TempPathFactory, offset: int, n_tokens: int, data: st.DataObject
):
    path = tmp_path_factory.mktemp("stored") / "x"
    tokens = np.random.default_rng(0).integers(0, 2**32, n_tokens, np.uint32)
    path.write_bytes(b"h" * offset + tokens.tobytes())
    stored = OpenTokens(path, np.dtype("<u4"), offset, n_tokens)
    part = TokenFile(path, stored, TokenInfo(dtype="uint32"))
    for _ in range(3):
        start = data.draw(st.integers(0, len(tokens)))
        stop = data.draw(st.integers(start, len(tokens)))
        assert part.read([start], stop - start).tolist() == [tokens[start:stop].tolist()]
        part, tokens = part.slice(start, stop), tokens[start:stop]
        assert len(part) == len(tokens)
        assert part.tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_cut_off_in_mid_run_is_one_line_and_no_crash(path: Path, mapped: bool):
    file = TokenFile.open(path)
    loader = Loader([file], 4, 32)
    loader.batch(0)
    if mapped:
        assert file.tokens[-1] == 49_999
    os.truncate(path, 5000)
    message = r"train\.npy was cut off while in use: it had 100,000 bytes, now it has 5,000; bring the whole file back"
    with pytest.raises(RunFailed, match=message) as caught:
        [loader.batch(step) for step in range(10)]
    assert "\n" not in str(caught.value)
    for use in (lambda: file.tokens, file.fingerprint, lambda: file.read([40_000], 8)):
        with pytest.raises(RunFailed, match=message):
            use()


def test_a_deleted_file_is_read_to_the_end(path: Path):
    file = TokenFile.open(path)
    path.unlink()
    assert Loader([file], 4, 32).batch(700).max() < 60_000
    assert file.tokens[-1] == 49_999


def test_a_file_that_cannot_be_read_any_more(path: Path, monkeypatch: pytest.MonkeyPatch):
    file = TokenFile.open(path)

    def fail(*_: int) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(RunFailed, match=r"cannot read .*train\.npy any more: Input/output error"):
            file.read([0], 8)


def test_the_fingerprint_of_a_source_is_that_of_its_start(path: Path):
    data = resolve_data(path, context=32)
    before = data.fingerprint()
    np.frombuffer(path.read_bytes(), np.uint16)[::-1].tofile(path)
    assert data.fingerprint() == before
    assert resolve_data(path, context=32).fingerprint() != before


def test_descriptors_are_given_back(path: Path):
    count = len(list(Path("/dev/fd").iterdir()))
    for _ in range(20):
        file = TokenFile.open(path)
        file.slice(3, 9).read([0], 3)
        assert file.tokens[7] == 7
    del file
    assert len(list(Path("/dev/fd").iterdir())) == count
