"""Result files of real runs, but tiny ones, and the whole way from a command to a page."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers_runs import config_of
from sdd.commands.main import main
from sdd.data import TokenFile, TokenInfo, eval_windows
from sdd.errors import UserError
from sdd.lab import results
from sdd.lab.definition import PlannedStudy, Request
from sdd.lab.results import HeldOut, answers, config_hash, portable
from sdd.lab.segments import tuning_windows
from sdd.lab.studies.robustness import DEFINITION
from sdd.models import ModelConfig
from sdd.train import DataConfig, OptimConfig, RunConfig
from sdd.train.run_dir import RunDir
from sdd.train.trainer import start

REASON = "step 31: loss nan: not finite"
TINY = RunConfig(
    model=ModelConfig(n_layers=1, d_model=16, d_ff=32, n_heads=2, n_kv_heads=1, vocab_size=4096, context=32),
    data=DataConfig(batch_size=4),
    optim=OptimConfig(lr=2e-2, warmup=2),
    steps=30,
    eval_every=10,
    eval_sequences=16,
    sample_tokens=0,
    device="cpu",
    compile=False,  # as studies ask for: "auto" is no setting that a run ends with
)


def held_out(n: int) -> TokenFile:
    """A token file of so many tokens, each its own number."""
    return TokenFile(Path("tokens.npy"), np.arange(n, dtype=np.uint32), TokenInfo(dtype="uint32"))


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 300))
def test_tuning_and_reporting_read_different_tokens(n: int, context: int, more: int) -> None:
    file = held_out(2 * n * context + 1 + more)
    targets = [set(windows[:, 1:].flatten().tolist()) for windows in (
        eval_windows(file, n, context), tuning_windows(file, n, context)
    )]  # fmt: skip
    assert [len(tokens) for tokens in targets] == [n * context] * 2
    assert not targets[0] & targets[1]


def test_too_little_held_out_text_is_said() -> None:
    with pytest.raises(UserError, match="have 7 windows of 8 tokens, a study needs 8"):
        tuning_windows(held_out(60), 4, 8)


def test_hash_is_of_what_is_computed() -> None:
    config = config_of()
    same = [
        replace(config, threads=7),
        replace(config, model=replace(config.model, placement=replace(config.model.placement, source="a book"))),
    ]
    other = [
        replace(config, seed=1),
        replace(config, steps=61),
        replace(config, optim=replace(config.optim, lr=5e-3)),
        replace(config, model=replace(config.model, placement=replace(config.model.placement, init="megatron"))),
    ]
    assert {config_hash(one) for one in same} == {config_hash(config)}
    assert config_hash(config) not in {config_hash(one) for one in other}


def test_folders_of_paths_are_not_part_of_a_result(tmp_path: Path) -> None:
    data = DataConfig(path=f"{tmp_path}/a.npy:0.7,{tmp_path}/b.npy:0.3", tokenizer=f"{tmp_path}/tokenizer.json")
    moved = DataConfig(path="elsewhere/a.npy:0.7,b.npy:0.3", tokenizer="tokenizer.json")
    first, second = (replace(config_of(), data=one) for one in (data, moved))
    assert config_hash(first) == config_hash(second)
    assert str(tmp_path) not in str(portable(first))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    threads = torch.get_num_threads()
    run = tmp_path_factory.mktemp("runs") / "good"
    start(TINY, run).run()
    torch.set_num_threads(threads)
    return run


def test_a_result_says_what_the_run_says(trained: Path, tmp_path: Path) -> None:
    found = results.harvest(trained, HeldOut(TINY))
    said = json.loads((trained / "result.json").read_text())
    assert (found.status, found.step, found.tokens) == ("did not converge", 30, said["tokens"])
    assert "token frequencies alone reach" in found.reason or "begun at" in found.reason
    assert found.eval_loss == pytest.approx(said["eval_loss"], abs=1e-6)
    assert found.curve["eval_loss"][-1] == found.eval_loss
    assert found.curve["tokens"] == [1280, 2560, 3840]
    assert len(found.training["loss"]) == 30
    assert abs(found.tuning_loss - found.eval_loss) < 0.5
    assert found.tuning_loss != found.eval_loss
    assert answers(found, TINY)
    assert not answers(found, replace(TINY, seed=1))
    file = results.save(found, tmp_path)
    assert results.load(file) == found
    assert str(trained.parent) not in file.read_text()


def test_a_run_that_became_non_finite_has_no_loss(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "bad"
    shutil.copytree(trained, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": "nan", "grad_norm": "nan", "tokens": 3968, "lr": 0.1, "seconds": 1}\n')
    RunDir(run).write_json("result.json", {"status": "failed", "step": 31, "cause": "diverged", "reason": REASON})
    found = results.harvest(run, HeldOut(TINY))
    assert (found.status, found.reason) == ("did not converge", REASON)
    assert math.isnan(found.eval_loss)
    assert math.isnan(found.tuning_loss)
    json.loads(results.save(found, tmp_path).read_text(), parse_constant=pytest.fail)


def test_a_damaged_result_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "run"')
    with pytest.raises(UserError, match=r"run\.json is no result of a run"):
        results.load(tmp_path / "run.json")


def test_results_of_before_a_field_existed_still_answer() -> None:
    plan = PlannedStudy(DEFINITION, Request(Path(), "nano", 1))
    _, config = plan.run(plan.arms[0], plan.conditions[0], 1e-3, 0)
    from helpers_studies import made_result

    found = made_result("run", config, 5.0)
    older = {key: value for key, value in found.config.items() if key != "chunked_loss"}
    assert answers(replace(found, config=older), config)


@pytest.mark.slow
def test_from_a_command_to_a_page_and_on_from_a_clone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--model.n_layers 1 --model.d_model 16 --model.d_ff 32 --model.n_heads 2 --model.n_kv_heads 1"
    small = f"{shape} --model.context 32 --data.batch_size 2 --steps 6 --eval_sequences 8 --threads 1 --device cpu"
    one = f"study lr --placements sdd --seeds 1 --lr 1e-3 {small} --out {tmp_path / 'study'}"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        from sdd.commands import study
        from sdd.lab.arms import Rates
        from sdd.lab.studies import lr_sensitivity

        few = replace(lr_sensitivity.DEFINITION, rates=Rates("sweep", (0.5, 1.0)))
        patched.setattr(study, "studies", {"lr": few})
        patched.setattr("sdd.lab.engine.MOST_EXTENSIONS", 0)
        assert main(one.split()) == 0
        clone = tmp_path / "clone"
        shutil.copytree(tmp_path / "study", clone, ignore=shutil.ignore_patterns("runs", "claims", "configs", "logs"))
        page = (clone / "report.html").read_text()
        assert main(["study", "lr", "--out", str(clone)]) == 0
        assert (clone / "report.html").read_text() == page.replace(str(tmp_path / "study"), str(clone))
        assert not (clone / "runs").exists()
    assert len(list((clone / "results").glob("*.json"))) == 2
    assert "| sdd " in capsys.readouterr().out
    assert page.count("<svg") == 1
    for part in ("What cannot be concluded", "one seed", "sdd study lr", "arXiv 2309.14322"):
        assert part in page
