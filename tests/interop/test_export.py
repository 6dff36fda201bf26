"""`sdd export`: what it writes, what it refuses, and that nothing half-written stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers_interop import EXPERTS, drawn_model, finished_run, in_this_process, logits
from helpers_models import drawn_tokens, tiny_config

from helpers_runs import edit_json
from sdd.commands.main import main
from sdd.data import Tokenizer, builtin_tokenizer
from sdd.evals.text import load_trained
from sdd.interop import export, fresh, modeling_sdd
from sdd.interop.architecture import CLASSES
from sdd.interop.export import export_run
from sdd.interop.fresh import Agreement, NotTheSame, agreement, check
from sdd.models import LanguageModel

FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_sdd.py"),
    *("tokenizer.json", "tokenizer_config.json", "curves.png"),
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("export"), "sdd-released")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "_in_fresh_process", in_this_process)


def refused(*args: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line by which a command is refused."""
    assert main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("sdd: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.ties
def test_an_export_loads_without_sdd(tmp_path: Path, capsys) -> None:
    """The real fresh process: `sdd` cannot be imported in it, and the classes come from the folder."""
    run = finished_run(tmp_path, "sdd", moe=EXPERTS, n_layers=2)
    assert main(["export", str(run), str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class"] == "SDDForCausalLM"
    assert found["agreement"]["float32"] < 1e-5
    assert 0 < found["agreement"]["bfloat16"] < 1
    assert 0 < found["agreement"]["generated"] < 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert (tmp_path / "out" / "modeling_sdd.py").read_bytes() == Path(str(modeling_sdd.__file__)).read_bytes()


@pytest.mark.ties
def test_a_folder_that_does_not_load_is_not_kept(run: Path, tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "modeling_sdd.py"
    broken.write_text(export.MODELING.read_text().replace("import torch\n", "import torch\nimport sdd\n", 1))
    monkeypatch.setattr(export, "MODELING", broken)
    with pytest.raises(NotTheSame, match=r"does not load in a fresh process: .*sdd"):
        export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["modeling_sdd.py"]


@pytest.mark.ties
@pytest.mark.parametrize(
    ("forgetful", "words"),
    [
        ("None", "neither the inputs nor the cache hold"),  # takes no cache
        ("DynamicCache(config=self.config)", "while it generates with a cache differ"),  # takes another
    ],
)
def test_a_folder_that_forgets_its_cache_is_not_kept(
    forgetful: str, words: str, run: Path, tmp_path: Path, monkeypatch
) -> None:
    """Logits of single passes agree, and generation does not: so it is when transformers renames an argument."""
    broken, text = tmp_path / "modeling_sdd.py", export.MODELING.read_text()
    taken = "        cache = given_cache(past_key_values, kwargs)\n        if cache"
    assert taken in text
    broken.write_text(
        text.replace(taken, f"        given_cache(None, kwargs)\n        cache = {forgetful}\n        if cache")
    )
    monkeypatch.setattr(export, "MODELING", broken)
    with pytest.raises(NotTheSame, match=words):
        export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["modeling_sdd.py"]


def test_the_fresh_process_asks_nobody(tmp_path: Path, monkeypatch) -> None:
    """A question of transformers would not be seen, and would read what is typed for the next command."""
    monkeypatch.setattr(fresh, "_CHILD", "import sys; sys.exit(f'it read {sys.stdin.read()!r}')")
    reader, writer = os.pipe()
    os.write(writer, b"typed ahead")
    os.close(writer)
    kept = os.dup(0)
    os.dup2(reader, 0)
    try:
        with pytest.raises(fresh.NotTheSame, match="it read ''"):
            fresh.compare(tmp_path, drawn_model(tiny_config("sdd")), [])
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reader)


def test_the_modeling_file_imports_torch_and_transformers_only() -> None:
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    assert set(get_imports(export.MODELING)) <= {"torch", "transformers", "collections", "dataclasses", "typing"}
    assert not get_relative_imports(export.MODELING)


@pytest.mark.parametrize("placement", ["olmo2", "prenorm", "prenorm-qk", "sdd-released", "ngpt"])
def test_what_is_exported(placement: str, tmp_path: Path, quick: None) -> None:
    run, out = finished_run(tmp_path, placement), tmp_path / "out"
    found = export_run(run, out)
    assert found.agreement.float32 < 1e-5
    native = {"olmo2": "olmo2", "prenorm": "llama", "prenorm-qk": "qwen3"}
    assert found.kind == native.get(placement, "sdd")
    assert {path.name for path in out.iterdir()} == FILES - ({"modeling_sdd.py"} if placement in native else set())
    assert json.loads((out / "config.json").read_text())["architectures"] == [CLASSES[found.kind]]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    trained = load_trained(run)
    tokens = drawn_tokens(trained.model.config)
    with torch.no_grad():
        torch.testing.assert_close(logits(theirs.eval(), tokens), trained.model(tokens), rtol=1e-4, atol=1e-4)


def test_the_tokenizer_and_generation_are_those_of_the_run(run: Path, tmp_path: Path, quick: None) -> None:
    out = tmp_path / "out"
    assert export_run(run, out).remarks == []
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), builtin_tokenizer()
    text = "Of Café and whales,\n\n  12,345 of them."
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos
    assert theirs.padding_side == "left"
    assert Tokenizer.load(out).sha256 == ours.sha256
    settings = transformers.GenerationConfig.from_pretrained(out)
    assert (settings.eos_token_id, settings.pad_token_id, settings.temperature) == (ours.eos, ours.eos, 0.8)


def test_ids_without_text_are_not_generated(tmp_path: Path, quick: None) -> None:
    export_run(finished_run(tmp_path, "sdd", vocab_size=4100), tmp_path / "out")
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.suppress_tokens == [4096, 4097, 4098, 4099]


def test_the_card_tells_what_the_run_was(run: Path, tmp_path: Path, quick: None) -> None:
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "placement `sdd-released`",
        "numbers.txt",
        "4 steps of 24 tokens: 96 tokens",
        "| held-out loss, nats a token | 5.0000 |",
        "| ctx | RMS over full width, a scale each feature, eps 1e-05 |",
        "![Losses of the run against its tokens](curves.png)",
        "It has read at most 12 tokens at once",
        "trust_remote_code=True",
    ):
        assert part in card


def test_a_folded_export_says_what_it_merged(run: Path, tmp_path: Path, quick: None, capsys) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--fold"]) == 0
    out = capsys.readouterr().out
    assert "folded: ctx (3 of 3 blocks)" in out
    assert "kept as norms, since each token has its own scale there: attn_out, attn_post" in out
    assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 2
    assert "is a folded export, from which there is no way back" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


# --- agreement


def test_the_tolerances() -> None:
    check(Agreement(float32=1e-4, bfloat16=1.5, own_bfloat16=1.0, generated=0.0))
    with pytest.raises(NotTheSame, match=r"float32 logits differ from the run's by 1\.1e-04 of their std"):
        check(Agreement(float32=1.1e-4, bfloat16=0.0, own_bfloat16=1.0, generated=0.0))
    with pytest.raises(NotTheSame, match=r"bfloat16 logits are 1.6 .* more than 1.5 times the 1 of our own"):
        check(Agreement(float32=0.0, bfloat16=1.6, own_bfloat16=1.0, generated=0.0))
    with pytest.raises(NotTheSame):
        check(Agreement(float32=float("nan"), bfloat16=0.0, own_bfloat16=1.0, generated=0.0))
    with pytest.raises(NotTheSame, match=r"while it generates with a cache differ from those of one pass by 1\.1e-04"):
        check(Agreement(float32=0.0, bfloat16=1.0, own_bfloat16=1.0, generated=1.1e-4))


def test_distances_are_in_standard_deviations_of_the_logits() -> None:
    ours = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 7
    one = torch.zeros_like(ours)
    one[0, 1, 2] = 1.0
    steps = {"steps": ours, "whole": ours + 3 * one}
    found = agreement(ours, ours + 2, {"float32": ours - one, "bfloat16": ours + one, **steps})
    std = float(ours.std())
    assert found.float32 == pytest.approx(1 / std, rel=1e-4)
    assert found.own_bfloat16 == pytest.approx(2 / std, rel=1e-4)
    assert found.bfloat16 == pytest.approx(30**-0.5 / std, rel=1e-4)
    assert found.generated == pytest.approx(3 / std)


def test_another_model_is_not_the_same(tmp_path: Path, monkeypatch) -> None:
    model = drawn_model(tiny_config("sdd"))
    wrong: LanguageModel = drawn_model(tiny_config("sdd"), seed=1)

    def answer(folder: Path, tokens_BT, texts):
        with torch.no_grad():
            return dict.fromkeys(("float32", "bfloat16", "steps", "whole"), wrong(tokens_BT)), []

    monkeypatch.setattr(fresh, "_in_fresh_process", answer)
    with pytest.raises(NotTheSame):
        fresh.compare(tmp_path, model, [])


# --- bad input


def test_a_folder_that_exists_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "own.txt").write_text("mine")
    line = refused("export", run, tmp_path, capsys=capsys)
    assert f"{tmp_path} exists: name a new folder" in line
    assert (tmp_path / "own.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"status": "interrupted"}, "is interrupted (at step 4 of 4): finish it (sdd resume"),
        ({"status": "unheard of"}, "is unfinished (running, or killed, at step 4 of 4): finish it"),
        (
            {"status": "failed", "cause": "diverged", "reason": "step 3: loss nan"},
            "did not converge (step 3: loss nan)",
        ),
    ],
    ids=["interrupted", "unfinished", "diverged"],
)
def test_a_run_that_is_not_finished_is_refused(result: dict, words: str, tmp_path: Path, quick: None, capsys) -> None:
    run = finished_run(tmp_path, "sdd")
    edit_json(run / "result.json", **result)
    line = refused("export", run, tmp_path / "out", capsys=capsys)
    assert words in line
    assert line.strip().endswith("--checkpoint 4")
    assert not list(tmp_path.glob("*out*"))
    assert main(["export", str(run), str(tmp_path / "out"), "--checkpoint", "4"]) == 0
    assert "This is a checkpoint of it." in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_a_tokenizer_is_refused(tmp_path: Path, capsys) -> None:
    run = finished_run(tmp_path, "sdd")
    config = json.loads((run / "config.json").read_text())
    tokens = tmp_path / "tokens.npy"
    torch.randint(4096, (4000,)).numpy().astype("uint16").tofile(tokens)
    config["data"] |= {"path": str(tokens), "dtype": "uint16"}
    edit_json(run / "config.json", data=config["data"])
    assert "the tokenizer of" in refused("export", run, tmp_path / "out", capsys=capsys)
    assert not list(tmp_path.glob("*out*"))


def test_what_is_no_run_is_refused(tmp_path: Path, capsys) -> None:
    assert "is no run" in refused("export", tmp_path, tmp_path / "of" / "mine" / "out", capsys=capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_stays(run: Path, tmp_path: Path, quick: None) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".tmp-out-{dead.stdout.strip()}-1"
    left.mkdir()
    mine = tmp_path / f".tmp-out-{os.getpid()}-1"
    mine.mkdir()
    export_run(run, tmp_path / "out")
    assert not left.exists()
    assert mine.exists()
