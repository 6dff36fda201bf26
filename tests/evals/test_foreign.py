"""A transformers folder: the same scores and losses as transformers itself gives, request by request."""

import json
import math
import shutil

import pytest
import torch
from helpers_evals import choice_rows, write_requests

from sdd.commands.main import main
from sdd.data.tokenizer import BUILTIN
from sdd.errors import UserError
from sdd.evals.foreign import TransformersScorer, evaluate_transformers, is_transformers
from sdd.evals.likelihood import encode_pairs, score

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
CONTEXT = 24
WORDS = "It is a truth universally acknowledged, that a single man must be in want of a wife. "


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "with beginning of text"])
def folder(request, tmp_path_factory):
    """A llama with random weights and the built-in tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 4096, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**shape)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    model.save_pretrained(path)
    names = {"bos_token": "<|endoftext|>"} if request.param else {}
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(BUILTIN), eos_token="<|endoftext|>", **names)
    if request.param:
        from tokenizers.processors import TemplateProcessing

        words.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    words.save_pretrained(path)
    return path


def plain(folder, context, continuation):
    """The log-likelihood of a continuation by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    whole, before = words(context + continuation)["input_ids"], words(context)["input_ids"]
    targets = whole[len(before) :]
    inputs = torch.tensor([whole[:-1][-CONTEXT:]])
    with torch.no_grad():
        logprobs = model(inputs).logits[0, -len(targets) :].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(targets)[:, None]).sum().item()


def test_scores_are_those_of_transformers(folder):
    model = TransformersScorer(folder)
    texts = [
        ("It is", " a truth"),
        ((WORDS * 2).strip(), " a wife"),
        ("Question: who?\nAnswer:", " nobody"),
        ("It", " is a man"),
    ]
    pairs = encode_pairs(model, texts)
    found = {
        index: each for indices, scores in score(model, pairs, 3) for index, each in zip(indices, scores, strict=True)
    }
    for index, (context, continuation) in enumerate(texts):
        assert found[index].logprob == pytest.approx(plain(folder, context, continuation), abs=1e-4)
    assert [found[index].cut > 0 for index in range(4)] == [False, True, False, False]


def test_the_loss_of_a_text_is_that_of_transformers(folder, tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 3)
    found = evaluate_transformers(TransformersScorer(folder), str(tmp_path / "text.txt"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(WORDS * 3)["input_ids"]
    nats = 0.0
    for first in range(0, len(ids) - 1, CONTEXT):
        window = torch.tensor([ids[first : first + CONTEXT + 1]])
        with torch.no_grad():
            logprobs = model(window[:, :-1]).logits[0].log_softmax(-1)
        nats -= logprobs.gather(-1, window[0, 1:, None]).sum().item()
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    size = len((WORDS * 3).encode()) - (len(words.decode(ids[:1])) if ids[0] else 0)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_the_command_takes_the_folder(folder, tmp_path, capsys):
    file = write_requests(tmp_path / "sums.jsonl", choice_rows(3))
    words = ["eval", str(folder), "--tasks", str(file), "--out", str(tmp_path / "scores"), "--json"]
    assert main(words) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers) == ["tasks"]
    assert numbers["tasks"]["sums"]["documents"] == 3


@pytest.mark.parametrize(
    ("words", "message"), [([], "no held-out data of its own"), (["--checkpoint", "4", "--tasks", "x"], "")]
)
def test_what_a_folder_does_not_have_is_one_line(folder, words, message, capsys):
    assert main(["eval", str(folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_transformers_cannot_load_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert is_transformers(tmp_path)
    with pytest.raises(UserError, match="transformers cannot load"):
        TransformersScorer(tmp_path)


def copied(folder, to, change):
    """The folder again, with other fields in its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | change))
    return to


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"model_type": "gpt2"}])
def test_weights_that_are_missing_are_not_drawn(folder, change, tmp_path):
    with pytest.raises(UserError, match="do not fit its config"):
        TransformersScorer(copied(folder, tmp_path / "model", change))


def test_weights_that_have_no_place_are_told(folder, tmp_path, caplog):
    TransformersScorer(copied(folder, tmp_path / "model", {"num_hidden_layers": 1}))
    assert "weights have no place in the model and do not count" in caplog.text


@pytest.mark.parametrize("change", [{"model_type": ["llama"]}, {"hidden_size": "wide"}, {"num_attention_heads": 0}])
def test_a_config_that_makes_no_model_is_refused(folder, change, tmp_path):
    with pytest.raises(UserError, match="transformers cannot load"):
        TransformersScorer(copied(folder, tmp_path / "model", change))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", bytes(100), b'{"weight_map": 3}'])
def test_damaged_weights_are_refused(folder, name, content, tmp_path):
    path = copied(folder, tmp_path / "model", {})
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match="transformers cannot load"):
        TransformersScorer(path)


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    own = {"model_type": "its-own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"}}
    with pytest.raises(UserError, match="code of its own"):
        TransformersScorer(copied(folder, tmp_path / "model", own))
