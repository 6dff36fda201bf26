"""A run converted in mid-course: what is carried over, what is calibrated, what is refused."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers_train import little, rows
from safetensors.torch import load_file

from sdd.commands.main import main
from sdd.models import ModelConfig
from sdd.placement import Norm, placements
from sdd.train.converting import checked, with_layers
from sdd.train.trainer import reopen, start

STEPS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one block, Pre-Norm."""
    folder = tmp_path_factory.mktemp("converted")
    config = little(folder, steps=STEPS, checkpoint_every=4, probe_every=0, sample_tokens=0)
    config = replace(config, model=replace(config.model, placement=placements["prenorm"]))
    start(config, folder / "run").run()
    return folder / "run"


def tensors(run, step=STEPS):
    files = (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "how", [("--placement", "sdd-prenorm"), ("--placement", "prenorm-qk"), ("--layers", "o_proj,down_proj")]
)
def test_weights_moments_and_random_state_are_carried_over_and_the_old_run_is_only_read(run, how, tmp_path, capsys):
    before = digests(run)
    assert main(["convert", str(run), "--out", str(tmp_path / "new"), *how, "--json"]) == 0
    assert digests(run) == before
    old, new = tensors(run), tensors(tmp_path / "new")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    added = [name for name in new if name not in old and name.startswith("model.")]
    assert added
    assert all(name.endswith(".alpha") for name in added)
    assert all(not new[name].any() for name in new if name not in old and name.startswith("optimizer."))
    done = json.loads(capsys.readouterr().out)
    assert sorted(done["errors"]) == sorted(name[len("model.") : -len(".alpha")] for name in added)
    assert done["step"] == STEPS


def test_the_loss_stands_before_right_after_and_during_healing(run, tmp_path, capsys):
    new = tmp_path / "new"
    assert main(["convert", str(run), "--out", str(new), "--layers", "down_proj", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert main(["resume", str(new), "--steps", str(STEPS + 6), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    evaluations = [(row["step"], row["eval_loss"]) for row in rows(new) if "eval_loss" in row]
    assert (STEPS, done["before"]) in evaluations
    assert (STEPS, done["after"]) in evaluations
    assert evaluations[-1] == (STEPS + 6, result["eval_loss"])
    assert [row["step"] for row in rows(new) if "loss" in row] == list(range(1, STEPS + 7))
    assert json.loads((new / "convert.json").read_text())["from"] == str(run)
    assert result["placement"] == "prenorm + ffn_out"


def test_the_next_batches_are_those_of_the_old_run(run, tmp_path):
    """The loss of the first step after the conversion is that of the converted model on the old run's next batch."""
    new = tmp_path / "new"
    main(["convert", str(run), "--out", str(new), "--layers", "o_proj"])
    shutil.copytree(run, tmp_path / "old")
    one, other = (reopen(folder, STEPS + 1) for folder in (new, tmp_path / "old"))
    assert torch.equal(one.loader.batch(STEPS), other.loader.batch(STEPS))
    for trainer in (one, other):
        trainer.run_dir.unlock()


MODEL = ModelConfig(
    n_layers=3, d_model=32, d_ff=48, n_heads=2, n_kv_heads=1, vocab_size=64, context=16, placement=placements["prenorm"]
)


def test_layers_become_a_placement():
    made = with_layers(MODEL, ["o_proj", "blocks.1.*.gate_proj", "q_proj"], heads=True)
    assert made.norms == {**placements["prenorm"].norms, "attn_out": Norm(), "q": Norm(group="head")}
    assert made.overrides == {1: {"gate": Norm()}}
    assert checked(MODEL, made) is made


def test_all_layers_of_a_placement_equal_it():
    made = with_layers(MODEL, ["*_proj"])
    norms = {site: replace(norm, alpha_init="one") for site, norm in placements["sdd-prenorm"].norms.items()}
    assert made.norms == norms
    assert not made.overrides


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--layers o_porj", "fits no projection (did you mean 'o_proj'?)"),
        ("--placement postnorm", "another norm at"),
        ("--placement prenorm", "adds no norm to a projection of prenorm"),
        ("--placement ngpt", "another residual than prenorm"),
        ("--placement sdd-prenrom", "did you mean 'sdd-prenorm'?"),
        ("", "give either --placement NAME or --layers"),
        ("--placement sdd-prenorm --heads", "--heads goes with --layers"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(run, words, match, tmp_path, capsys):
    assert main(["convert", str(run), "--out", str(tmp_path / "new"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_no_run_and_a_taken_directory_are_one_line(run, tmp_path, capsys):
    layers = ["--layers", "o_proj"]
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "new"), *layers]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["convert", str(run), "--out", str(run), *layers]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_overrides_that_count_from_the_end_do_not_undo_a_chosen_norm():
    last = replace(placements["prenorm"], overrides={-1: {"ffn_in": None, "attn_out": None}}, name="")
    made = with_layers(replace(MODEL, placement=last), ["blocks.2.*.o_proj"])
    assert made.layer(2, 3) == {"attn_in": Norm(), "attn_out": Norm()}
    assert "attn_out" not in made.layer(1, 3)
    assert "ffn_in" in made.layer(1, 3)
