"""Drawn arguments for every command: an exit code and at most a line, never a traceback."""

import io
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd.commands import main as cli
from sdd.commands.main import main

#: For each command its options, and positional words that take it further than nonsense does.
COMMANDS = {
    "train": [
        "nano",
        "micro",
        "run/config.json",
        "--steps",
        "--lr",
        "--out",
        "--placement",
        "--data",
        "--model.d_model",
    ],
    "resume": ["run", "empty", "--json"],
    "report": ["run", "empty", "words.txt", "--out"],
    "generate": ["run", "--prompt", "--tokens", "--temperature", "--top-k", "--top-p", "--seed", "--json"],
    "eval": ["run", "empty", "--text", "words.txt", "--tasks", "table1", "--limit", "--batch-size", "--out", "--json"],
    "convert": ["run", "empty", "--out", "--placement", "sdd-paper", "--layers", "o_proj", "--sequences", "--json"],
    "export": ["run", "empty", "model", "--checkpoint", "--fold", "--json"],
    "import": ["run", "empty", "--out", "--data", "words.txt", "--steps", "--lr", "--json"],
    "probe": ["run", "empty", "--data", "words.txt", "--placement", "--batches", "--json", "--out"],
    "plan": [
        "nano",
        "581m",
        "--gpu",
        "h100",
        "--gpus",
        "--tokens",
        "--mfu",
        "--micro-batch",
        "--context",
        "--batch-size",
        "--gpus-per-node",
        "--link",
        "--network",
        "--parallel.tensor",
    ],
    "presets": ["nano", "1b", "--placement", "sdd", "--json"],
    "study": ["dem", "--out", "--seeds", "--workers"],
    "bench": ["kernels", "step-time", "nano", "--widths", "--variants", "--modes", "--device", "--out", "--batch"],
    "tokenize": ["words.txt", "run", "--out", "tokens", "--tokenizer", "--validation-fraction", "--dtype", "--eos"],
}
ANYTHING = st.one_of(
    st.text(max_size=12),
    st.binary(max_size=6).map(os.fsdecode),  # bytes that are no UTF-8, as Python passes them on
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["--", "-", "=", "--=", "..", "/", "-h", "none", "0", "1", "-1", "nan", "1e400", "x" * 300]),
).filter(lambda word: "\0" not in word)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run of a little model, a text, and an empty folder."""
    folder = tmp_path_factory.mktemp("drawn")
    np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16).tofile(folder / "tokens.npy")
    shape = "--model.n_layers 1 --model.d_model 16 --model.d_ff 16 --model.n_heads 2 --model.n_kv_heads 1"
    data = f"--data {folder / 'tokens.npy'} --data.dtype uint16 --data.eos 0 --data.batch_size 2 --model.vocab_size 64"
    line = f"train nano {shape} {data} --model.context 16 --steps 2 --eval_sequences 2 --out {folder / 'run'}"
    assert main(line.split()) == 0
    (folder / "words.txt").write_text("It was the best of times, it was the worst of times.\n" * 50)
    (folder / "empty").mkdir()
    return folder


#: Valid arguments of each command, to which drawn words are added. Train and study would take too long.
RIGHT = {
    "resume": ["run"],
    "report": ["run"],
    "generate": ["run", "--prompt", "It was"],
    "eval": ["run"],
    "convert": ["run", "--layers", "o_proj"],
    "plan": ["nano", "--gpu", "h100"],
    "bench": ["step-time", "nano"],
    "presets": ["nano"],
    "tokenize": ["words.txt", "--workers", "1"],
}


@st.composite
def arguments(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    pair = st.tuples(st.sampled_from(COMMANDS[command]), ANYTHING)
    drawn = draw(st.lists(pair | st.tuples(ANYTHING) | st.tuples(st.sampled_from(COMMANDS[command])), max_size=4))
    words = [*draw(st.sampled_from([[], RIGHT.get(command, [])])), *(word for words in drawn for word in words)]
    # drawn arguments may be right, and would then train or measure for hours
    words += {"train": ["--model.n_heads", "0"], "bench": ["--rounds", "0"]}.get(command, [])
    return [command, *words]


@settings(max_examples=200)
@given(arguments())
def test_no_arguments_end_in_a_traceback(folder, words):
    answer = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # strict, as a terminal is
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", answer)
        try:
            code = main(words)
        except SystemExit as end:
            assert {"-h", "--help"} & set(words)
            code = end.code
    assert code in (0, 2, 3, 130)


@settings(max_examples=50)
@given(st.lists(ANYTHING, max_size=3))
def test_nor_do_words_that_are_no_command(words):
    assert main(words) in (0, 2)


def test_every_command_is_drawn():
    assert set(COMMANDS) == set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("given", "code", "expected"),
    [
        ("--steps 100000000000000000000", 2, "steps=100000000000000000000"),
        ("--seed 9223372036854775808", 2, "seed=9223372036854775808"),
        ("--threads 1000000", 2, "threads=1000000"),
        ("--data.batch_size 1000000000000000", 3, "not enough memory"),
    ],
)
def test_numbers_beyond_all_bounds_are_one_line(folder, tmp_path, capsys, given, code, expected):
    capsys.readouterr()
    settings = [str(folder / "run" / "config.json"), *given.split()]
    assert main(["train", *settings, "--out", str(tmp_path / "run")]) == code
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_a_report_does_not_replace_a_pipe(folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["report", str(folder / "run"), "--out", str(tmp_path / "pipe")]) == 2
    assert str(tmp_path / "pipe") in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_a_tensor_too_large_for_torch_is_a_failure_for_want_of_memory(monkeypatch, capsys):
    def too_large(_):
        torch.empty(2**62)

    monkeypatch.setattr(cli, "_run", too_large)
    assert main(["train"]) == 3
    err = capsys.readouterr().err
    assert "not enough memory" in err
    assert err.count("\n") == 1
