"""Tasks on a model: the same numbers however often it is interrupted, and the command."""

import json
import re
from pathlib import Path

import pytest
from helpers_evals import choice_rows, request, scorer, write_requests

from sdd.commands.main import main
from sdd.errors import Interrupted, UserError
from sdd.evals import tasks
from sdd.evals.requests import load_task
from sdd.evals.tasks import run_tasks


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_requests(tmp_path / "sums.jsonl", choice_rows(8), "acc_per_char")


def interrupt_at(calls: int):
    def progress(name: str, done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    file: Path, tmp_path: Path, calls: int, torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = scorer(), load_task(str(file))
    whole = run_tasks(model, [task], tmp_path / "whole", batch_size=4)
    with pytest.raises(Interrupted, match=r"the same command goes on"):
        run_tasks(model, [task], tmp_path / "parts", batch_size=4, progress=interrupt_at(calls))
    [kept] = (tmp_path / "parts").glob("*.jsonl")
    known = len(kept.read_text().splitlines())
    assert 0 < known < len(set(task.documents[0].choices)) * 16
    if torn:
        with kept.open("ab") as stream:
            stream.write(b'{"key": "0123')
    asked: list[int] = []
    encode = tasks.encode_pairs
    monkeypatch.setattr(tasks, "encode_pairs", lambda m, texts: asked.append(len(texts)) or encode(m, texts))
    again = run_tasks(model, [task], tmp_path / "parts", batch_size=4)
    texts = {text for document in task.documents for text in (*document.choices, *document.unconditional)}
    assert asked == [len(texts) - known]
    assert again == {"sums": pytest.approx(whole["sums"])}
    run_tasks(model, [task], tmp_path / "parts", batch_size=4)
    assert asked[1:] == [0]


def test_scores_of_other_weights_are_not_taken(file: Path, tmp_path: Path) -> None:
    task = load_task(str(file))
    found = [run_tasks(scorer(seed), [task], tmp_path)["sums"]["bits_per_byte"] for seed in (0, 1)]
    alone = run_tasks(scorer(1), [task], tmp_path / "alone")["sums"]["bits_per_byte"]
    assert found[0] != found[1] == alone


def test_a_folder_that_cannot_be_written_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"cannot write into .*--out"):
        run_tasks(scorer(), [load_task(str(file))], tmp_path / "taken")


def test_the_command_prints_tasks_as_json_and_as_a_table(
    run: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(run), "--tasks", str(file), "--out", str(tmp_path / "scores")]
    assert main([*words, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["step"] == 4
    assert "loss" not in numbers
    found = numbers["tasks"]["sums"]
    assert found["documents"] == 8
    assert found["primary"] == "acc_per_char"
    assert main([*words, "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"sums +2 +33\.3", out)
    assert "cut off on the left" in out, "the run's context of 16 tokens is shorter than the questions"


def test_the_command_takes_a_task_by_name_and_the_text_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [request(number, 0, "It was", f" number {number}") for number in range(3)]
    write_requests(tmp_path / "cloze" / "bpb_0shot" / "requests.jsonl", rows)
    (tmp_path / "text.txt").write_text("It was the best of times.")
    words = ["eval", str(run), "--tasks", "cloze", "--task-data", str(tmp_path), "--text", str(tmp_path / "text.txt")]
    assert main([*words, "--out", str(tmp_path / "scores"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["tokens"] > 1
    assert numbers["tasks"]["cloze"]["perplexity"] > 1


@pytest.mark.parametrize(("tasks", "message"), [("no_such_task", "no_such_task"), ("", "task"), ("x/y,z", "x/y")])
def test_a_task_that_is_not_there_is_one_line(
    run: Path, tasks: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--tasks", tasks, "--task-data", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
