"""A run as a model of lm-eval: the same numbers as `sdd eval`, on a task with local data."""

import json
import re
from types import SimpleNamespace

import pytest
from helpers_lm_eval import choice_rows, small_run, write_requests

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from sdd.data import builtin_tokenizer
from sdd.errors import UserError
from sdd.evals.generation import continue_texts
from sdd.evals.requests import load_task
from sdd.evals.scorer import RunScorer
from sdd.evals.tasks import run_tasks
from sdd.evals.text import evaluate_run, load_trained
from sdd.interop import lm_eval as adapter
from sdd.interop.lm_eval import SDDModel

pytestmark = pytest.mark.ties


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("lm-eval"))


def asked(*args):
    return SimpleNamespace(args=args)


def command(monkeypatch, folder, run):
    """lm-eval's command with our model, on a task of a file on this machine."""
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    settings = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.json")}, "cache_dir": str(folder / "c")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: what is {{number}}?\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": ["one", "two"],
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "sums.yaml").write_text(json.dumps(settings))
    (folder / "documents.json").write_text("".join(f'{{"number": {i}, "label": {i % 2}}}\n' for i in range(6)))
    words = ["--model", "sdd", "--model_args", f"run={run}", "--tasks", "sums", "--include_path", str(folder / "tasks")]
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", *words])
    return adapter.main()


@pytest.mark.filterwarnings("ignore")
def test_the_command_of_lm_eval_takes_a_run(run, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, run) == 0
    assert re.search(r"\|sums *\|.*\|acc *\|", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_run_is_one_line(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, tmp_path / "nowhere") == 2
    assert f"sdd: {tmp_path / 'nowhere'} is no run" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_accuracies_agree_with_lm_evals_own(run, tmp_path):
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    rows = [row for row in choice_rows(12) if row["doc_id"] < 1_000_000]
    file = write_requests(tmp_path / "sums.jsonl", rows)
    ours = run_tasks(RunScorer(load_trained(run)), [load_task(str(file))], tmp_path / "scores")["sums"]
    documents = [
        {
            "question": document.choices[0][0],
            "choices": [choice.removeprefix(" ") for _, choice in document.choices],
            "label": document.label,
        }
        for document in load_task(str(file)).documents
    ]
    (tmp_path / "documents.json").write_text("".join(json.dumps(document) + "\n" for document in documents))
    settings = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.json")}, "cache_dir": str(tmp_path / "c")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    task = ConfigurableTask(config=settings)
    found = lm_eval.simple_evaluate(model=SDDModel(str(run)), tasks=[task], bootstrap_iters=0, log_samples=True)
    theirs = found["results"]["sums"]
    assert theirs["acc,none"] == pytest.approx(ours["acc"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["acc_per_char"])
    logprobs = [float(answer[0]) for sample in found["samples"]["sums"] for answer in sample["filtered_resps"]]
    scored = [
        json.loads(line)["logprob"] for line in next((tmp_path / "scores").glob("*.jsonl")).read_text().splitlines()
    ]
    assert sorted(logprobs) == pytest.approx(sorted(scored), abs=1e-4)


def test_a_rolling_text_is_predicted_whole(run, tmp_path):
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
    [found] = SDDModel(str(run)).loglikelihood_rolling([asked(text)])
    eos = builtin_tokenizer().eos
    assert eos is not None
    model = RunScorer(load_trained(run))
    ids = [eos, *builtin_tokenizer().encode(text)]
    import torch

    nats = 0.0
    for first in range(1, len(ids), model.context):
        stop = min(first + model.context, len(ids))
        before = ids[max(0, stop - 1 - model.context) : stop - 1]
        logits = model.logits(torch.tensor([before]), len(before) - (stop - first))[0].log_softmax(-1)
        nats += logits.gather(-1, torch.tensor(ids[first:stop])[:, None]).sum().item()
    assert found == pytest.approx(nats, rel=1e-4)
    (tmp_path / "text.txt").write_text(text)
    assert evaluate_run(run, tmp_path / "text.txt")["tokens"] == len(ids) - 2


def test_generated_texts_are_greedy_and_end_at_a_stop_string(run):
    settings = {"until": ["e"], "max_gen_toks": 12}
    prompts = ["Line 12 says", "A"]
    found = SDDModel(str(run)).generate_until([asked(prompt, settings) for prompt in prompts])
    expected = continue_texts(load_trained(run), prompts, 12, stop=["e"], temperature=0)
    assert found == [continuation.text for continuation in expected]


def test_empty_contexts_and_texts_have_a_likelihood(run):
    model = SDDModel(str(run))
    [(logprob, _)] = model.loglikelihood([asked("", " a")])
    assert logprob < 0
    assert model.loglikelihood_rolling([asked(""), asked(" a")]) == [0.0, pytest.approx(logprob)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs a run"),
        ({"pretrained": "x"}, "no argument"),
        ({"checkpont": 1}, "did"),
    ],
)
def test_wrong_arguments_of_the_model_are_the_users_mistake(arguments, words, run):
    with pytest.raises(UserError, match=words):
        SDDModel(**{**({"run": str(run)} if arguments else {}), **arguments})
