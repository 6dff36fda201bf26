"""`sdd import`: models of transformers and our own exports become runs; what does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_interop import (
    config_of,
    drawn_model,
    edit_config,
    exported,
    finished_run,
    in_this_process,
    saved,
    text_file,
)

from sdd.commands.main import main
from sdd.data import builtin_tokenizer
from sdd.evals.text import evaluate_run, load_trained
from sdd.interop import fresh
from sdd.interop.architecture import CLASSES, NATIVE
from sdd.interop.export import export_run
from sdd.interop.imported import import_model
from sdd.placement import placements

SETTINGS = ["--steps", "3", "--data.batch_size", "2", "--device", "cpu", "--sample_tokens", "0", "--eval_every", "0"]


def source(folder: Path, kind: Any = "llama", **changes: Any) -> Path:
    """A folder with a tiny model of transformers, and the built-in tokenizer."""
    config = config_of(NATIVE[kind], vocab_size=4096, rope_theta=10_000.0)
    saved(exported(drawn_model(config), kind), folder)
    builtin_tokenizer().save(folder / "tokenizer.json")
    edit_config(folder, **changes)
    return folder


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line by which an import is refused, after which there is no run."""
    out = folder.parent / "run"
    assert main(["import", str(folder), "--out", str(out), *more]) == 2
    stdout, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("reading ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("sdd: ")
    assert not stdout
    assert not list(folder.parent.glob("*run*"))
    return lines[0]


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_model_becomes_a_run(kind: Any, tmp_path: Path, capsys) -> None:
    folder, run = source(tmp_path / "model", kind), tmp_path / "run"
    data = text_file(tmp_path / "data")
    assert main(["import", str(folder), "--out", str(run), "--data", str(data), *SETTINGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class"] == CLASSES[kind]
    assert found["difference"] < 1e-5
    trained = load_trained(run)
    assert trained.step == 0
    assert trained.config.model.placement.name == NATIVE[kind].name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(4096, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(trained.model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_every_command_takes_the_run(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(fresh, "_in_fresh_process", in_this_process)
    folder, run = source(tmp_path / "model", "olmo2"), tmp_path / "run"
    data = text_file(tmp_path / "data")
    assert main(["import", str(folder), "--out", str(run), "--data", str(data), *SETTINGS]) == 0
    before = evaluate_run(run, sequences=2)
    assert before["step"] == 0
    assert main(["generate", str(run), "--prompt", "Line 1", "--tokens", "3"]) == 0
    assert main(["probe", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "again")]) == 0  # step 0 of an import is whole
    assert main(["resume", str(run)]) == 0
    assert evaluate_run(run, sequences=2)["step"] == 3
    assert evaluate_run(run, sequences=2)["loss"] < before["loss"]
    capsys.readouterr()


@pytest.mark.parametrize("placement", ["sdd", "lns", "ngpt"])
def test_an_export_comes_back(placement: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fresh, "_in_fresh_process", in_this_process)
    run = finished_run(tmp_path, placement)
    export_run(run, tmp_path / "out")
    if placement == "lns":
        edit_config(tmp_path / "out", tensor_parallel=None)  # as earlier versions wrote it
    data = str(text_file(tmp_path / "data"))
    found = import_model(tmp_path / "out", tmp_path / "back", {"data.path": data, "device": "cpu"})
    one, two = load_trained(run), load_trained(tmp_path / "back")
    assert found.config.model == one.config.model == two.config.model
    tokens = torch.randint(4096, (2, 12))
    with torch.no_grad():
        expected = one.model(tokens)
        torch.testing.assert_close(two.model(tokens), expected, rtol=0, atol=1e-5 * float(expected.std()))


def test_the_run_stands_alone(tmp_path: Path) -> None:
    folder = source(tmp_path / "model")
    data = str(text_file(tmp_path / "data"))
    import_model(folder, tmp_path / "run", {"data.path": data, "device": "cpu"})
    for file in folder.iterdir():
        file.unlink()
    result = evaluate_run(tmp_path / "run", sequences=1)
    assert result["bits_per_byte"] > 0
    assert not list(tmp_path.glob(".tmp*"))


def test_a_shorter_context_may_be_taken(tmp_path: Path) -> None:
    data = str(text_file(tmp_path / "data"))
    settings = {"data.path": data, "device": "cpu", "model.context": 8}
    import_model(source(tmp_path / "model"), tmp_path / "run", settings)
    assert load_trained(tmp_path / "run").config.model.context == 8


@pytest.mark.parametrize(("more", "said"), [(0, False), (1, True)])
def test_a_longer_context_than_the_models_is_said(more: int, said: bool, tmp_path: Path) -> None:
    folder = source(tmp_path / "model")
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"] + more
    settings = {"data.path": str(text_file(tmp_path / "data")), "device": "cpu", "model.context": context}
    found = " ".join(import_model(folder, tmp_path / "run", settings).remarks)
    assert (f"model.context={context} is longer than the model's {context - more}" in found) is said


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"attention_bias": True}, "has attention_bias=true (biases)"),
        ("llama", {"mlp_bias": True}, "has mlp_bias=true (biases)"),
        ("llama", {"hidden_act": "gelu"}, "has hidden_act='gelu' (runs have silu)"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "has rope scaling (linear)",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope scaling (linear)",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None},
            "window",
        ),
        ("qwen3", {"head_dim": 8}, "has head_dim=8 (runs have hidden_size / heads, 4)"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
        ("llama", {"model_type": "gpt2"}, "holds a gpt2 model: sdd import takes llama, qwen3, olmo2, sdd"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
        ("llama", {"hidden_size": "wide"}, "no valid config of LlamaForCausalLM"),
        ("llama", {"vocab_size": 4095}, "do not fit its config (mismatched keys: ('lm_head.weight'"),
    ],
)
def test_what_does_not_fit_is_named(kind: Any, changes: dict, words: str, tmp_path: Path, capsys) -> None:
    assert words in refused(source(tmp_path / "model", kind, **changes), capsys)


def test_missing_weights_are_not_drawn(tmp_path: Path, capsys) -> None:
    assert "missing keys: model.layers.3" in refused(source(tmp_path / "model", num_hidden_layers=4), capsys)


def test_weights_without_a_place_are_not_dropped(tmp_path: Path, capsys) -> None:
    assert "unexpected keys: model.layers.2" in refused(source(tmp_path / "model", num_hidden_layers=2), capsys)


def test_damaged_weights_are_refused(tmp_path: Path, capsys) -> None:
    folder = source(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    assert "the weights of" in refused(folder, capsys)
    (folder / "model.safetensors").unlink()
    assert "the weights of" in refused(folder, capsys)


def test_a_model_without_tokenizer_is_refused(tmp_path: Path, capsys) -> None:
    folder = source(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json: name the model's tokenizer with --data.tokenizer" in refused(folder, capsys)


def test_what_is_no_model_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in refused(tmp_path / "empty", capsys)
    assert "absent is no folder" in refused(tmp_path / "absent", capsys)


def test_a_run_is_no_model_to_import(tmp_path: Path, capsys) -> None:
    run = finished_run(tmp_path / "trained", "sdd")
    assert main(["import", str(run), "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == f"sdd: {run} is a run already: sdd resume, eval and generate take it\n"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": ["llama"]}', '{"model_type": null}'])
def test_a_config_that_names_no_model_is_refused(text: str, tmp_path: Path, capsys) -> None:
    folder = source(tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert "model_type" in (line := refused(folder, capsys)) or "holds a " in line


@pytest.mark.parametrize(
    "words",
    [
        "generate RUN --prompt a",
        "probe RUN",
        "report RUN",
        "resume RUN",
        "convert RUN --out X --layers up",
        "export RUN X",
    ],
)
def test_a_model_is_no_run(words: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    line = words.replace("RUN", str(tmp_path)).replace("X", str(tmp_path / "new"))
    assert main(line.split()) == 2
    assert "a model of transformers, not a run: sdd import DIR --out RUN makes a run of it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_fields_of_the_model_cannot_be_set(tmp_path: Path, capsys) -> None:
    line = refused(source(tmp_path / "model"), capsys, "--model.d_ff", "30")
    assert "model.d_ff is that of the imported model: leave it out" in line


def test_a_run_that_exists_is_kept(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert main(["import", str(source(tmp_path / "model")), "--out", str(run)]) == 2
    assert f"{run} exists: name a new folder" in capsys.readouterr().err
    assert (run / "config.json").read_text() == "{}"


def test_an_export_that_was_edited_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(fresh, "_in_fresh_process", in_this_process)
    export_run(finished_run(tmp_path / "of", "sdd"), tmp_path / "out")
    edit_config(tmp_path / "out", joint_gate_up=True)
    assert "joint_gate_up was changed after the export" in refused(tmp_path / "out", capsys)
    edit_config(tmp_path / "out", joint_gate_up=False, sdd={"placement": "sdd"})
    assert "config.json: the field 'model.n_layers' is missing" in refused(tmp_path / "out", capsys)


def test_every_native_placement_has_its_class() -> None:
    assert {placement.name for placement in NATIVE.values()} <= placements.keys()
