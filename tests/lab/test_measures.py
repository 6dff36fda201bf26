"""What studies keep of a run, taken from real runs, but tiny ones."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdd.files import read_json_lines
from sdd.lab import measures, results
from sdd.lab.results import HeldOut
from sdd.models import LanguageModel, ModelConfig
from sdd.placement import placements
from sdd.train import DataConfig, OptimConfig, RunConfig
from sdd.train.run_dir import RunDir
from sdd.train.trainer import Trainer, start

LAYERS = 3
TINY = RunConfig(
    model=ModelConfig(n_layers=LAYERS, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, vocab_size=4096, context=32),
    data=DataConfig(batch_size=2),
    optim=OptimConfig(lr=2e-2, warmup=2),
    steps=20,
    eval_every=10,
    eval_sequences=8,
    probe_every=5,
    sample_tokens=0,
    device="cpu",
    compile=False,
)
HELD_OUT = HeldOut(TINY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    run = tmp_path_factory.mktemp("runs") / "run"
    start(TINY, run).run()
    torch.set_num_threads(threads)
    return run


def test_every_training_loss_is_kept(trained: Path) -> None:
    said = [row["loss"] for row in read_json_lines(trained / "metrics.jsonl") if "loss" in row]
    assert measures.training_losses(trained, HELD_OUT)["losses"] == pytest.approx(said, rel=1e-3)
    assert len(said) == TINY.steps


def test_gradients_of_a_group_are_those_of_its_matrices_together(tmp_path: Path) -> None:
    config = replace(TINY, steps=4, model=replace(TINY.model, placement=placements["sdd-released"]))
    (tmp_path / "run").mkdir()
    trainer: Trainer = start(config, tmp_path / "run")
    norm = float(trainer.gradients(0)[1])
    clip = min(1.0, config.optim.grad_clip / norm)  # they are clipped here, and not as the probe sees them
    squares = {
        name: float(weight.grad.square().sum())
        for name, weight in trainer.model.named_parameters()
        if weight.grad is not None
    }
    expected = {
        group: [
            math.sqrt(sum(squares[f"blocks.{block}.{name}.weight"] for name in names)) / clip for block in range(LAYERS)
        ]
        for group, names in measures.GROUPS.items()
    }
    trainer.optimizer.zero_grad()
    trainer.run()
    found = measures.group_gradients(tmp_path / "run", HELD_OUT)
    assert found["steps"] == [1, 2, 4]
    for group, norms in expected.items():
        assert found["norms"][group][0] == pytest.approx(norms, rel=1e-2)


def test_gradients_by_the_stream_are_the_probes(trained: Path) -> None:
    rows = {row["step"]: row for row in read_json_lines(trained / "probe.jsonl")}
    found = measures.stream_gradients(trained, HELD_OUT)
    assert found["steps"] == [1, 2, 10, 20]
    for step, row in zip(found["steps"], found["grad_rms"], strict=True):
        assert row == pytest.approx(rows[step]["layers"]["grad_rms"], rel=1e-3)
        assert len(row) == LAYERS + 1


def test_similarities_are_cosines_of_layers(trained: Path) -> None:
    found = measures.layer_similarity(trained, HELD_OUT)
    for name, n in (("outputs", LAYERS + 1), ("updates", LAYERS)):
        table = torch.tensor(found[name])
        assert table.shape == (n, n)
        assert torch.equal(table, table.T)
        assert table.abs().max() <= 1
        assert table.diagonal().tolist() == pytest.approx([1.0] * n, abs=1e-3)
    assert json.loads(json.dumps(found)) == found


def test_layers_that_add_nothing_are_alike_and_layers_that_repeat_add_alike() -> None:
    model = LanguageModel(replace(TINY.model, placement=placements["prenorm"])).eval()
    tokens = torch.randint(TINY.model.vocab_size, (2, 32))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    stream = measures._stream(model, tokens)
    assert measures._cosines(stream) == [[1.0] * (LAYERS + 1)] * (LAYERS + 1)
    apart = measures._cosines([torch.eye(4), torch.eye(4).roll(1, 0), -torch.eye(4)])
    assert apart == [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]


def test_a_run_that_diverged_has_no_similarity(tmp_path: Path) -> None:
    RunDir(tmp_path).write_json("result.json", {"status": "failed", "cause": "diverged"})
    assert measures.layer_similarity(tmp_path, HELD_OUT) == {}


def test_a_result_keeps_what_was_measured_and_reads_it_back(trained: Path, tmp_path: Path) -> None:
    found = results.harvest(trained, HELD_OUT, lambda *_: {"norms": {"a": [[1.5, math.inf], [math.nan, 2.0]]}})
    back = results.load(results.save(found, tmp_path))
    rows = measures.numbers(back, "norms", "a")
    assert rows[0] == [1.5, math.inf]
    assert math.isnan(rows[1][0])
    assert measures.numbers(back, "norms", "b") is None
    assert results.harvest(trained, HELD_OUT).measured == {}
