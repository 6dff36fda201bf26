import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sdd
from sdd.commands.main import main
from sdd.models import model_presets

TINY = "--model.n_layers 1 --model.d_model 16 --model.d_ff 16 --model.n_heads 2 --model.n_kv_heads 1 --model.context 16"
TINY += " --data.batch_size 2 --steps 4 --eval_sequences 2 --sample_tokens 4"


def run(line, *more):
    return main([*line.split(), *map(str, more)])


def command(line, *more, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "sdd", *line.split(), *map(str, more)]
    return subprocess.Popen(
        words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trian", "no command 'trian' (did you mean 'train'?)"),
        ("train nanoo", "no preset 'nanoo' (did you mean 'nano'?)"),
        ("train", "PRESET"),
        ("train nano --stepz 3", "unknown argument --stepz (did you mean '--steps'?)"),
        ("train nano --steps", "--steps: expected one argument"),
        ("train nano --steps x", "steps='x'"),
        ("train nano --steps 0", "steps=0 must be at least 1"),
        ("train nano --placement prenrm", "no placement 'prenrm' (did you mean 'prenorm'?)"),
        ("train nano --lr=-1", "lr=-1.0 must be at least 0"),
        ("train nano --lr nan", "lr=nan must be finite"),
        ("train nano --optim.schedule cosin", "optim.schedule='cosin'"),
        ("train nano --model.n_heads 3", "n_heads=3 does not divide d_model=64"),
        ("train nano --device cuda:9", "device='cuda:9'"),
        ("train nano --data /no/such/file.txt", "/no/such/file.txt"),
        ("train nano --accumulate 3", "accumulate=3 does not divide data.batch_size=4"),
        ("train nano --chunked_loss true --optim.z_loss 0.1", "leave out chunked_loss"),
        ("train nano --printed-shape", "nano is not one"),
        ("train nano --model.vocab_size 100", "model.vocab_size=100 is too small"),
        ("train /no/such/config.json", "cannot read /no/such/config.json"),
        ("resume /no/such/run", "holds no run"),
        ("resume /no/such/run --steps -3", "'-3' is not a whole number"),
        ("presets nan", "no preset 'nan'"),
        ("presets nano --placement x", "no placement 'x'"),
        ("study dem", "no study 'dem' (did you mean 'demo'?)"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdd: ")
    assert expected in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        run("train --help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--placement", "--lr", "--warmup", "--init-scale", "--data", "--seed", "--optim.weight_decay"):
        assert option in text
    assert run("--help") == 0
    assert run("--version") == 0
    assert sdd.__version__ in capsys.readouterr().out


def test_train_report_generate_eval(tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        run(f"train nano {TINY} --json --placement olmo2 --lr 1e-3 --init-scale 0.5 --warmup 2 --seed 3 --out", out)
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["step"]) == ("done", 4)
    config = json.loads((out / "config.json").read_text())
    assert config["optim"]["lr"] == 1e-3
    assert config["optim"]["warmup"] == 2
    assert config["model"]["init_scale"] == 0.5
    assert config["seed"] == 3
    assert config["model"]["placement"]["name"] == "olmo2"
    assert run("report", out) == 0
    assert "<svg" in (out / "report.html").read_text()
    assert run("generate", out, "--prompt", "It was", "--tokens", "3") == 0
    assert "It was" in capsys.readouterr().out
    assert run("eval", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0


def test_config_json_feeds_back_in(tmp_path):
    assert run(f"train nano {TINY} --out", tmp_path / "one") == 0
    assert run("train", tmp_path / "one" / "config.json", "--out", tmp_path / "two") == 0
    one, two = ((tmp_path / name / "config.json").read_text() for name in ("one", "two"))
    assert one == two


def test_the_vocabulary_grows_to_the_data(tmp_path):
    assert run(f"train nano {TINY} --out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"] == 4096


def test_without_out_a_free_directory_is_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(f"train nano {TINY}") == 0
    assert run(f"train nano {TINY}") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["nano-sdd", "nano-sdd-2"]


def test_presets_list_and_show(capsys):
    assert run("presets") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*model_presets, *sdd.placements))
    assert run("presets 1b --placement sdd-released") == 0
    assert "1,059,274,752" in capsys.readouterr().out
    assert run("presets nano --json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["d_model"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "run"
    process = command(f"train nano {TINY} --steps 100000 --out", out)
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"sdd resume {out}" in err
    assert "Traceback" not in err
    step = json.loads((out / "result.json").read_text())["step"]
    process = command("resume", out, "--steps", step + 2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"going on from step {step}" in err


def test_importing_the_layer_does_not_import_the_trainer():
    heavy = ["sdd.train", "sdd.models", "pydantic", "tokenizers", "matplotlib", "rich"]
    code = f"import sys, sdd; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
