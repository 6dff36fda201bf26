"""Texts to evaluate on: the kinds of files that are trained on, and the mistakes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.data import builtin_tokenizer
from sdd.errors import UserError
from sdd.evals.text import evaluate_run
from sdd.evals.texts import read_texts, token_ids

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=1, max_size=5)


@given(texts=TEXTS)
def test_json_lines_are_their_texts_with_an_end_between_two(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("texts") / "some.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    assert read_texts(str(file)) == texts
    tokenizer = builtin_tokenizer()
    ids = token_ids(texts, "some", tokenizer.encode_batch, tokenizer.eos)
    expected = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos)][:-1]
    assert ids.tolist() == expected


def test_a_run_reads_json_lines_as_it_reads_their_texts(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "It was the best of times."}) + "\n")
    (tmp_path / "a.txt").write_text("It was the best of times.")
    one, other = evaluate_run(run, tmp_path / "a.jsonl"), evaluate_run(run, tmp_path / "a.txt")
    assert {**one, "text": ""} == {**other, "text": ""}


def test_records_without_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": "y"}\n')
    assert read_texts(str(tmp_path / "a.jsonl")) == ["x", "y"]
    assert "1 records have no text" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wide.txt", "It was the best of times".encode("utf-16"), r"UTF-16.*iconv"),
        ("other.jsonl", b'{"content": "x"}\n', "content"),
        ("packed.txt", gzip.compress(b"text", mtime=0), "packed by gzip"),
        ("tokens.npy", np.arange(5).tobytes(), "token file"),
        ("paper.pdf", b"%PDF-1.7 \x00\x01", "PDF"),
    ],
)
def test_other_kinds_are_refused_with_what_to_do(run: Path, tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        evaluate_run(run, tmp_path / name)


def test_several_documents_need_an_end_of_text() -> None:
    with pytest.raises(UserError, match="no end of text to part them"):
        token_ids(["a", "b"], "some", builtin_tokenizer().encode_batch, None)
