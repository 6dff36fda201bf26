"""Loading a trained run, its loss on texts, and the loss of token frequencies."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdd.data import builtin_tokenizer, resolve_data
from sdd.errors import UserError
from sdd.evals import text as evals
from sdd.evals.generation import continue_texts
from sdd.evals.unigram import token_frequencies
from sdd.train import config_io
from sdd.train.config import resolve
from sdd.train.trainer import start

CONTEXT = 16
WORDS = "It is a truth universally acknowledged, that a single man must be in want of a wife."


@pytest.mark.parametrize("times", [1, 5, 40])
def test_loss_of_a_text_predicts_every_token_but_the_first(
    run: Path, tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evals, "_WINDOWS", 3)
    file = tmp_path / "text.txt"
    file.write_text(WORDS * times)
    found = evals.evaluate_run(run, file)
    ids = torch.tensor(builtin_tokenizer().encode(WORDS * times))
    model = evals.load_trained(run).model
    nats = 0.0
    for first in range(0, len(ids) - 1, CONTEXT):
        part = ids[first : first + CONTEXT + 1]
        with torch.no_grad():
            nats += model(part[None, :-1], part[None, 1:], reduction="none").sum().item()
    assert found["tokens"] == len(ids) - 1
    assert found["step"] == 4
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    n_bytes = len((WORDS * times).encode()) - len(builtin_tokenizer().decode(ids[:1].tolist()).encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_own_held_out_text_is_used_whole(run: Path) -> None:
    data = resolve(config_io.load(run / "config.json"))
    found = evals.evaluate_run(run)
    assert found["tokens"] == len(data.validation) - 1
    assert 0 < found["loss"] < 10


def test_some_sequences_are_those_of_the_runs_own_evaluation(run: Path) -> None:
    config = config_io.load(run / "config.json")
    told: list[tuple[int, int]] = []
    found = evals.evaluate_run(run, None, config.eval_sequences, lambda done, total: told.append((done, total)))
    result = json.loads((run / "result.json").read_text())
    assert found["loss"] == pytest.approx(result["eval_loss"], rel=1e-6)
    assert found["tokens"] == result["eval_tokens"]
    assert told[-1] == (config.eval_sequences, config.eval_sequences)


@pytest.mark.parametrize("sequences", [1, 2, 7, 10**6])
def test_the_number_of_windows_is_the_number_asked_for_or_all(run: Path, tmp_path: Path, sequences: int) -> None:
    file = tmp_path / "text.txt"
    file.write_text(WORDS * 20)
    ids = len(builtin_tokenizer().encode(WORDS * 20))
    found = evals.evaluate_run(run, file, sequences)
    assert found["tokens"] == min(sequences * CONTEXT, ids - 1)


def test_the_checkpoint_before_a_damaged_one_is_loaded(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    for file in run.rglob("*"):
        if file.is_file() and file.name != "lock":
            target = copy / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    (newest / "state.json").unlink()
    assert evals.load_trained(copy).step == 2
    with pytest.raises(UserError, match="not a whole checkpoint"):
        evals.load_trained(copy, "4")


def test_a_checkpoint_is_named_by_step_or_path(run: Path) -> None:
    by_step = evals.load_trained(run, "2")
    by_path = evals.load_trained(run, str(run / "checkpoints" / "step-00000002"))
    newest = evals.load_trained(run)
    assert (by_step.step, by_path.step, newest.step) == (2, 2, 4)
    for one, same, other in zip(*(found.model.parameters() for found in (by_step, by_path, newest)), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        evals.load_trained(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    config_io.save(config_io.load(run / "config.json"), tmp_path / "config.json")
    with pytest.raises(UserError, match="no whole checkpoint"):
        evals.load_trained(tmp_path)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [("3", "no checkpoint of step 3: it has 2, 4"), ("x/y", "no checkpoint x/y"), (".", "not a whole checkpoint")],
)
def test_a_missing_checkpoint_is_refused(run: Path, checkpoint: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evals.load_trained(run, checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"", "at least 2"),
        ("bad.txt", b"caf\xe9 \xff", "not UTF-8"),
        ("none.txt", None, "no data at"),
        (".", None, "holds no data"),
    ],
)
def test_a_text_that_cannot_be_evaluated_is_refused(
    run: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        evals.evaluate_run(run, tmp_path / name)


def test_tokens_without_a_tokenizer_give_a_loss_but_no_text(run: Path, tmp_path: Path) -> None:
    config = config_io.load(run / "config.json")
    ids = np.random.default_rng(0).integers(0, 50, 2000, dtype=np.uint16)
    (tmp_path / "train.npy").write_bytes(ids.tobytes())
    (tmp_path / "train.json").write_text('{"dtype": "uint16", "vocab_size": 4096}')
    config = replace(config, data=replace(config.data, path=str(tmp_path / "train.npy")))
    start(config, tmp_path / "run").run()
    found = evals.evaluate_run(tmp_path / "run")
    assert found["bits_per_byte"] is None
    assert found["loss"] > 0
    with pytest.raises(UserError, match="tokenizer"):
        next(continue_texts(evals.load_trained(tmp_path / "run"), ["x"], 5))


def test_token_frequencies_are_counted_in_the_training_text(run: Path) -> None:
    data = resolve(config_io.load(run / "config.json"))
    counts = dict.fromkeys(range(data.vocab_size), 1)
    for file in data.train:
        for token in file.tokens.tolist():
            counts[token] += 1
    held_out = np.asarray(data.validation.tokens)
    targets = held_out[1 : (len(held_out) - 1) // CONTEXT * CONTEXT + 1]
    reference = token_frequencies(data, 10**6, CONTEXT)
    total = sum(counts.values())
    assert reference.loss == pytest.approx(-np.mean([math.log(counts[token] / total) for token in targets.tolist()]))
    assert reference.bits_per_byte is not None
    assert reference.loss < math.log(data.vocab_size)


def test_frequencies_of_a_uniform_text_give_the_uniform_loss(tmp_path: Path) -> None:
    (tmp_path / "train.npy").write_bytes(np.arange(64, dtype=np.uint16).repeat(100).tobytes())
    (tmp_path / "train.json").write_text('{"dtype": "uint16", "vocab_size": 64}')
    (tmp_path / "validation.npy").write_bytes(np.arange(64, dtype=np.uint16).tobytes())
    (tmp_path / "validation.json").write_text('{"dtype": "uint16", "vocab_size": 64}')
    reference = token_frequencies(resolve_data(tmp_path, context=CONTEXT), 10, CONTEXT)
    assert reference.loss == pytest.approx(math.log(64))
    assert reference.bits_per_byte is None
