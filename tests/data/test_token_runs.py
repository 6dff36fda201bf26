"""Data seen from a run: what happens when they change, vanish or come from elsewhere."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdd.commands.main import main
from sdd.data import TokenFile
from sdd.errors import RunFailed, UserError
from sdd.models import ModelConfig
from sdd.placement import placements
from sdd.train import DataConfig, RunConfig, config_io
from sdd.train.trainer import reopen, start


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A headerless file of tokens without a json, as others write them."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    for name, n_tokens in (("train.bin", 6000), ("val.bin", 600)):
        np.random.default_rng(0).integers(0, 500, n_tokens).astype(np.uint16).tofile(folder / name)
    return folder


def config(path: Path | str, **data) -> RunConfig:
    model = ModelConfig(
        n_layers=1,
        d_model=16,
        d_ff=16,
        n_heads=2,
        n_kv_heads=1,
        vocab_size=500,
        context=16,
        placement=placements["sdd"],
    )
    return RunConfig(
        model,
        DataConfig(str(path), batch_size=4, dtype="uint16", eos=0, **data),
        steps=8,
        checkpoint_every=4,
        keep_checkpoints=0,
        eval_every=0,
        eval_sequences=4,
        device="cpu",
    )


def losses(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def at_step(trainer, step: int, do) -> None:
    """Do something just before the batch of a step is read."""
    batch = trainer.loader.batch

    def hooked(number: int) -> torch.Tensor:
        if number == step:
            do()
        return batch(number)

    trainer.loader.batch = hooked


def test_a_file_cut_off_in_mid_run_ends_it_with_its_name_and_it_goes_on_when_the_file_is_back(
    tmp_path: Path, tokens: Path
):
    start(config(tokens), tmp_path / "whole").run()
    trainer = start(config(tokens), tmp_path / "run")
    content = (tokens / "train.bin").read_bytes()
    at_step(trainer, 6, lambda: os.truncate(tokens / "train.bin", 1000))
    with pytest.raises(
        RunFailed, match=r"step 6: .*train\.bin was cut off .* had 12,000 bytes, now it has 1,000; .*6$"
    ):
        trainer.run()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    with pytest.raises(UserError, match=r"train\.bin had 6000 tokens, has 500\): bring those back, or start a new run"):
        reopen(tmp_path / "run")
    (tokens / "train.bin").write_bytes(content)
    reopen(tmp_path / "run").run()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_bad_id_that_was_not_seen_at_the_start_ends_the_run_after_saving(tmp_path: Path, tokens: Path, monkeypatch):
    monkeypatch.setattr(TokenFile, "check_ids", lambda self: None)  # as of a file too long to look at every token
    start(config(tokens), tmp_path / "whole").run()
    content = (tokens / "train.bin").read_bytes()
    trainer = start(config(tokens), tmp_path / "run")
    at_step(trainer, 6, lambda: (tokens / "train.bin").write_bytes(b"\xff\xff" * 6000))
    with pytest.raises(RunFailed, match=r"step 6: .*holds token id 65535, .*position [\d,]+, counted from 0\); .*6$"):
        trainer.run()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["cause"], result["step"]) == ("failed", "stopped", 6)
    (tokens / "train.bin").write_bytes(content)
    reopen(tmp_path / "run").run()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_file_deleted_in_mid_run_is_used_to_the_end_and_missed_afterwards(tmp_path: Path, tokens: Path):
    trainer = start(config(tokens / "train.bin"), tmp_path / "run")
    at_step(trainer, 2, (tokens / "train.bin").unlink)
    assert trainer.run()["status"] == "done"
    with pytest.raises(UserError, match=r"no data at .*train\.bin"):
        reopen(tmp_path / "run", steps=12)


def test_more_data_on_resume_are_refused(tmp_path: Path, tokens: Path):
    start(config(tokens), tmp_path / "run").run()
    np.zeros(100, np.uint16).tofile(tokens / "more.bin")
    with pytest.raises(UserError, match=r"\(tokens/more\.bin is new\): bring those back, or start a new run"):
        reopen(tmp_path / "run", steps=12)
    (tokens / "more.bin").unlink()
    with (tokens / "train.bin").open("ab") as file:
        file.write(bytes(2000))
    with pytest.raises(UserError, match=r"tokens/train\.bin had 6000 tokens, has 7000"):
        reopen(tmp_path / "run", steps=12)


def test_a_mixture_is_trained_on_and_its_weights_are_kept(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tokens)
    (tokens / "val.bin").rename("more.bin")
    mixed = config("train.bin:0.75,more.bin:0.25")
    assert start(mixed, tmp_path / "whole").run()["status"] == "done"
    assert "train: 75.00% of the tokens" in capsys.readouterr().err
    start(replace(mixed, steps=4), tmp_path / "run").run()
    monkeypatch.chdir("/")
    saved = config_io.load(tmp_path / "run" / "config.json")
    assert saved.data.path == f"{tokens}/train.bin:0.75,{tokens}/more.bin:0.25"
    other = replace(saved, data=replace(saved.data, path=saved.data.path.replace("0.75", "0.5")))
    config_io.save(other, tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match="bring those back, or start a new run"):
        reopen(tmp_path / "run", steps=8)


def test_the_command_takes_files_of_others(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture):
    shape = [f"--model.{name}" for name in ("n_layers=1", "d_model=16", "d_ff=16", "n_heads=2", "n_kv_heads=1")]
    words = ["train", "nano", "--data", str(tokens), "--steps", "2", *shape, "--model.context=16", "--device=cpu"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 2
    assert "has no train.json beside it that names its dtype" in capsys.readouterr().err
    words += ["--data.dtype", "uint16", "--data.eos", "0", "--data.document_mask", "true", "--model.vocab_size", "500"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert main(["eval", str(tmp_path / "a"), "--json"]) == 0
    assert main([*words, "--data.eos", "-1", "--out", str(tmp_path / "b")]) == 2
    assert "eos=-1 must be at least 0" in capsys.readouterr().err
