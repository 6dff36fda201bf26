import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from sdd.data import Tokenizer, builtin_tokenizer
from sdd.errors import UserError


@given(st.text())
@example("a<|endoftext|>b")
@example("1941 it’s\r\n\r\n  \t x \x00 \U0001f600\u0301")
def test_decoding_undoes_encoding_and_every_byte_is_counted(text: str):
    tokenizer = builtin_tokenizer()
    ids = tokenizer.encode(text)
    sizes = tokenizer.token_bytes()
    assert tokenizer.decode(ids) == text
    assert sizes is not None
    assert sizes[ids].sum() == len(text.encode())
    assert tokenizer.eos not in ids
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


def test_builtin_has_4096_tokens_and_splits_digits():
    tokenizer = builtin_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos) == (4096, 0)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("19195")] == ["19", "19", "5"]
    assert tokenizer.decode([0]) == ""


def test_saving_keeps_the_hash(tmp_path: Path):
    builtin_tokenizer().save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).sha256 == builtin_tokenizer().sha256


def test_added_tokens_count_their_text_and_special_ones_nothing(tmp_path: Path):
    spec = json.loads(builtin_tokenizer().path.read_bytes())
    ordinary = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] += [
        {"id": 4096, "content": "§§é", "special": False, **ordinary},
        {"id": 4099, "content": "<pad>", "special": True, **ordinary},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    sizes = tokenizer.token_bytes()
    assert sizes is not None
    assert len(sizes) == tokenizer.vocab_size
    assert sizes[tokenizer.encode("a §§é<pad>b")].sum() == len("a §§é<pad>b".encode())
    assert sizes[4096] == len("§§é".encode())
    assert sizes[-1] == 0


def test_bytes_are_unknown_without_byte_level(tmp_path: Path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 7}, unk_token="b"))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.token_bytes() is None
    assert (tokenizer.vocab_size, tokenizer.eos) == (8, 7)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_fork_after_threads_is_silent_and_both_sides_go_on():
    program = """
import os
os.environ.pop("TOKENIZERS_PARALLELISM", None)
from sdd.data import builtin_tokenizer
work = lambda: builtin_tokenizer().encode_batch(["some text"] * 100)
before = work()
child = os.fork()
if child == 0:
    os._exit(work() != before)
assert os.waitpid(child, 0)[1] == 0
assert work() == before
assert "TOKENIZERS_PARALLELISM" not in os.environ
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_the_script_builds():
    from sdd.data.build_assets import train_tokenizer

    built, shipped = json.loads(train_tokenizer().to_str()), json.loads(builtin_tokenizer().path.read_bytes())
    assert built["model"]["merges"] == shipped["model"]["merges"]
    assert built["model"]["vocab"] == shipped["model"]["vocab"]
