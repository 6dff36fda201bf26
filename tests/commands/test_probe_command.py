"""`sdd probe` finds what a probe of a training step finds, before the update."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sdd
from sdd.commands.main import main
from sdd.models import ModelConfig, MoEConfig
from sdd.placement import placements
from sdd.train import DataConfig, OptimConfig, RunConfig, config_io
from sdd.train.router_stats import RouterStats
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, start

UPDATED = ("update_ratio", "angle")


def config(text: Path, placement: str = "sdd-released") -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            n_layers=2,
            d_model=16,
            d_ff=32,
            n_heads=2,
            n_kv_heads=1,
            vocab_size=4096,
            context=16,
            placement=placements[placement],
        ),
        data=DataConfig(path=str(text), batch_size=4),
        optim=OptimConfig(lr=1e-2, warmup=2, grad_clip=0.0),
        steps=4,
        accumulate=2,
        eval_every=0,
        eval_sequences=2,
        checkpoint_every=2,
        sample_tokens=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("probe_command") / "numbers.txt"
    file.write_text("\n".join(f"Line {number} says {number * number}." for number in range(2000)))
    return file


@pytest.fixture(scope="module")
def run(text: Path) -> Path:
    out = text.parent / "run"
    start(config(text), out).run()
    return out


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> list[dict]:
    assert main(["probe", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_untrained_weights_have_the_statistics_of_the_first_step(run: Path, text: Path, tmp_path: Path, capsys):
    (found,) = answer(capsys, run / "config.json")
    trainer = Trainer(config(text), RunDir(tmp_path))
    with sdd.Probe(trainer.model, trainer.optimizer) as probe:
        loss, _ = trainer.train_step(0)
    row = probe.latest
    assert row is not None
    assert found["layers"] == row["layers"]
    for stats in row["sites"].values():
        for stat in UPDATED:
            stats.pop(stat, None)
    assert found["sites"] == row["sites"]
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["step"] == 0


def test_a_run_is_its_newest_checkpoint_and_stays_as_it_is(run: Path, capsys):
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    newest, older, itself = (
        answer(capsys, run / "checkpoints" / "step-00000004"),
        answer(capsys, run / "checkpoints" / "step-00000002"),
        answer(capsys, run),
    )
    assert [found[0]["step"] for found in (newest, older, itself)] == [4, 2, 4]
    assert itself[0]["sites"] == newest[0]["sites"] != older[0]["sites"]
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == files


def test_two_weights_are_each_what_they_are_alone(run: Path, capsys):
    found = answer(capsys, run, run / "checkpoints" / "step-00000002")
    assert [each["step"] for each in found] == [4, 2]
    assert found[0] == answer(capsys, run)[0]


def test_two_placements_of_a_preset_have_their_own_sites(run: Path, capsys):
    two = answer(capsys, run / "config.json", "--placement", "prenorm", "--placement", "olmo2")
    assert [each["placement"] for each in two] == ["prenorm", "olmo2"]
    assert two[0]["sites"].keys() != two[1]["sites"].keys()


def test_two_stand_side_by_side_with_their_ratio(run: Path, capsys):
    assert main(["probe", str(run), str(run / "checkpoints" / "step-00000002")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("blocks.1.attn.q_proj"))
    words = [lines[first].split()[1:], *(line.split() for line in lines[first + 1 : first + 3])]
    assert [row[0] for row in words] == ["run", "run/step-00000002", "ratio"]
    for one, other, ratio in zip(*(row[1:] for row in words), strict=True):
        assert float(ratio) == pytest.approx(float(other) / float(one), rel=0.02)


def test_trained_weights_take_no_placement(run: Path, capsys):
    assert main(["probe", str(run), str(run / "config.json"), "--placement", "prenorm"]) == 2
    assert "--placement" in capsys.readouterr().err


def test_a_line_for_each_layer_and_each_site(run: Path, capsys):
    (found,) = answer(capsys, run)
    assert main(["probe", str(run)]) == 0
    first_words = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"layer 0", "layer 1", "layer 2"} <= set(first_words)
    assert set(found["sites"]) <= set(first_words)


def test_other_data_and_more_batches(run: Path, text: Path, tmp_path: Path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("A sentence of another kind, over and over again. " * 3000)
    own, same, more, others = (
        answer(capsys, run)[0],
        answer(capsys, run, "--data", text)[0],
        answer(capsys, run, "--batches", "3")[0],
        answer(capsys, run, "--data", other)[0],
    )
    assert own["sites"] == same["sites"]
    assert own["sites"]["embed"]["weight_norm"] == more["sites"]["embed"]["weight_norm"]
    assert len({each["sites"]["embed"]["rms"] for each in (own, more, others)}) == 3
    assert len({each["loss"] for each in (own, more, others)}) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "no preset 'nowhere'"),
        (["nano", "--placement", "sdd-relased"], "did you mean 'sdd-released'"),
        (["nano", "--placement", "sdd", "--placement", "olmo2", "--placement", "peri"], "at most two"),
        (["{run}/checkpoints"], "neither a run"),
        (["{run}", "--data", "{run}/missing.txt"], "no data at"),
        (["{run}", "--batches", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(run: Path, args: list[str], message: str, capsys):
    assert main(["probe", *(word.format(run=run) for word in args)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_data_of_a_larger_vocabulary_are_told(run: Path, tmp_path: Path, capsys):
    np.save(tmp_path / "tokens.npy", np.arange(5000, dtype=np.uint16))
    (tmp_path / "tokens.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 9000}))
    assert main(["probe", str(run), "--data", str(tmp_path / "tokens.npy")]) == 2
    assert "tokens has 9000 tokens, run knows 4096" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sparse(text: Path) -> tuple[Path, RouterStats]:
    """A run with experts, and the routing of its first step."""
    settings = replace(config(text), model=replace(config(text).model, moe=MoEConfig(3, 2)))
    out = text.parent / "mixture"
    trainer = Trainer(settings, RunDir(out))
    trainer.save()
    config_io.save(settings, out / "config.json")
    trainer.gradients(0)
    assert trainer.router_stats is not None
    return out, trainer.router_stats


def test_mixture_of_experts_has_the_routing_of_training(sparse: tuple[Path, RouterStats], capsys):
    out, expected = sparse
    (found,) = answer(capsys, out)
    for name, value in (expected.row() | expected.loads()).items():
        assert found[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), name


def test_mixture_of_experts_has_a_line_a_block_with_each_load(sparse: tuple[Path, RouterStats], capsys):
    out, _ = sparse
    (found,) = answer(capsys, out)
    assert main(["probe", str(out)]) == 0
    table = capsys.readouterr().out.partition("\nrouter ")[2].splitlines()
    for line, load, dead in zip(table[1:], found["expert_load"], found["routing"]["dead_experts"], strict=True):
        words = line.split()
        assert [float(word) for word in words[-3:]] == pytest.approx(load, rel=5e-3, abs=1e-3)
        assert int(words[-4]) == dead
