import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import sdd
from sdd.commands.main import COMMANDS, main
from sdd.models import model_presets
from sdd.train import config_io

#: The options of every command when this list was made; later ones may come, none may go.
OPTIONS = json.loads((Path(__file__).parent / "cli_options.json").read_text())

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
    ("line", "facts"),
    [
        ("trian", ["'trian'", "'train'"]),
        ("train nanoo", ["'nanoo'", "'nano'"]),
        ("train", ["PRESET"]),
        ("train nano --stepz 3", ["--stepz", "'--steps'"]),
        ("train nano --steps", ["--steps", "argument"]),
        ("train nano --steps x", ["steps", "'x'"]),
        ("train nano --steps 0", ["steps=0", "at least 1"]),
        ("train nano --placement prenrm", ["'prenrm'", "'prenorm'"]),
        ("train nano --lr=-1", ["lr=-1.0"]),
        ("train nano --lr nan", ["lr=nan"]),
        ("train nano --optim.schedule cosin", ["optim.schedule", "'cosin'"]),
        ("train nano --model.n_heads 3", ["n_heads=3", "d_model=64"]),
        ("train nano --device cuda:9", ["device", "'cuda:9'"]),
        ("train nano --data /no/such/file.txt", ["/no/such/file.txt"]),
        ("train nano --accumulate 3", ["accumulate=3", "data.batch_size=4"]),
        ("train nano --chunked_loss true --optim.z_loss 0.1", ["chunked_loss", "z_loss"]),
        ("train nano --steps 10 --warmup 10", ["optim.warmup=10", "steps=10", "at most 9"]),
        ("train nano --steps 10 --optim.schedule wsd --optim.decay_fraction 0", ["optim.decay_fraction=0", "0.1"]),
        ("train nano --optim.beta2 1", ["beta2=1.0", "less than 1"]),
        ("study lr --steps 10 --warmup 10", ["optim.warmup=10", "steps=10"]),
        ("train nano --printed-shape", ["--printed-shape", "nano"]),
        ("train nano --model.vocab_size 100", ["model.vocab_size=100"]),
        ("train /no/such/config.json", ["/no/such/config.json"]),
        ("resume /no/such/run", ["/no/such/run", "sdd train PRESET"]),
        ("resume /no/such/run --steps -3", ["--steps", "'-3'"]),
        ("presets nan", ["'nan'", "'nano'"]),
        ("presets --placement x", ["'x'", "prenorm"]),
        ("presets nano --placement x", ["'x'", "prenorm"]),
        ("study dem", ["'dem'", "'demo'"]),
    ],
)
def test_a_mistake_is_one_line_with_what_was_given_and_exit_code_2(line, facts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdd: ")
    assert err.count("\n") == 1
    assert [fact for fact in facts if fact not in err] == []
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def options_of(command, capsys):
    """The option strings in a command's --help."""
    with pytest.raises(SystemExit) as end:
        run(f"{command} --help")
    assert end.value.code == 0
    heads = re.findall(r"^  (-.*?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    return {word.split()[0] for head in heads for word in head.split(", ")}


@pytest.mark.parametrize("command", OPTIONS)
def test_a_command_has_the_options_that_it_always_had(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no line is broken
    assert options_of(command, capsys) >= set(OPTIONS[command])


def test_the_options_of_every_command_are_recorded():
    assert {name.split()[0] for name in OPTIONS} == set(COMMANDS)


@pytest.mark.parametrize("command", ["train", "study"])
def test_every_field_of_a_run_has_an_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    assert options_of(command, capsys) >= {f"--{dotted}" for dotted, _, _ in config_io.fields()}


def test_version_and_help_are_answers(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == sdd.__version__
    assert run("--help") == 0
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


def test_no_command_at_all_is_a_mistake(capsys):
    assert run("") == 2
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with short options, and what the command printed."""
    out = tmp_path_factory.mktemp("cli") / "run"
    options = "--json --placement olmo2 --lr 1e-3 --init-scale 0.5 --warmup 2 --seed 3"
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert run(f"train nano {TINY} {options} --out", out) == 0
    return out, json.loads(printed.getvalue())


def test_train_answers_with_its_result(trained):
    _, result = trained
    assert (result["status"], result["step"]) == ("done", 4)


def test_short_options_set_fields_of_the_config(trained):
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    assert config["optim"]["lr"] == 1e-3
    assert config["optim"]["warmup"] == 2
    assert config["model"]["init_scale"] == 0.5
    assert config["seed"] == 3
    assert config["model"]["placement"]["name"] == "olmo2"


def test_a_run_is_reported(trained):
    out, _ = trained
    assert run("report", out) == 0
    assert "<svg" in (out / "report.html").read_text()


def test_a_run_continues_a_text(trained, capsys):
    out, _ = trained
    assert run("generate", out, "--prompt", "It was", "--tokens", "3") == 0
    assert capsys.readouterr().out.startswith("It was")


def test_a_run_is_evaluated(trained, capsys):
    out, _ = trained
    assert run("eval", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0


def test_config_json_feeds_back_in(tmp_path):
    assert run(f"train nano {TINY} --out", tmp_path / "one") == 0
    assert run("train", tmp_path / "one" / "config.json", "--out", tmp_path / "two") == 0
    one, two = ((tmp_path / name / "config.json").read_text() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("options", "warmup", "said"), [("--warmup 2", 2, False), ("", 2, True), ("--optim.schedule wsd", 2, True)]
)
def test_a_warm_up_that_nobody_gave_shrinks_to_a_short_run(options, warmup, said, tmp_path, capsys):
    assert run(f"train nano {TINY} {options} --out", tmp_path / "run") == 0
    assert ("optim.warmup 40 -> 2" in capsys.readouterr().err) == said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert (max(rates), rates[-1]) == pytest.approx((4e-3, 4e-4))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["warmup"] == warmup


def test_a_config_json_with_a_schedule_that_does_not_fit_is_run_again_as_it_is(tmp_path, capsys):
    assert run(f"train nano {TINY} --out", tmp_path / "one") == 0
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    config["optim"]["warmup"] = 40
    (tmp_path / "old.json").write_text(json.dumps(config))
    assert run("train", tmp_path / "old.json", "--out", tmp_path / "two") == 0
    assert json.loads((tmp_path / "two" / "config.json").read_text())["optim"]["warmup"] == 40


def test_the_vocabulary_grows_to_the_data(tmp_path):
    assert run(f"train nano {TINY} --out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"] == 4096


def text_folder(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("One line of a text that is long enough to train on.\n" * 200)
    (folder / "a.md5").write_text("0")
    return folder


def test_what_is_left_out_of_the_data_is_said_once(tmp_path, monkeypatch, caplog):
    text_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="sdd"):
        assert run(f"train nano {TINY} --data data --out run") == 0
    assert sum("of no known kind: a.md5" in line for line in caplog.messages) == 1


def test_what_cannot_work_is_noticed_before_the_data_are_tokenised(tmp_path, monkeypatch, capsys, caplog):
    data, full = text_folder(tmp_path / "data"), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    monkeypatch.setenv("SDD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    caplog.set_level("INFO", logger="sdd")
    for wrong, said in (
        (["--device", "mps", "--out", tmp_path / "run"], "device='mps' is not available"),
        (["--out", full], "is not empty"),
    ):
        assert run(f"train nano {TINY} --data", data, *wrong) == 2
        assert said in capsys.readouterr().err
    assert "tokenising" not in caplog.text


def test_without_out_a_free_directory_is_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(f"train nano {TINY}") == 0
    assert run(f"train nano {TINY}") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["nano-sdd", "nano-sdd-2"]


def test_presets_lists_presets_and_placements(capsys):
    assert run("presets") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*model_presets, *sdd.placements))


def test_presets_are_json_all_together_or_one(capsys):
    assert run("presets --json --placement prenorm") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(model_presets)
    for name in ("nano", "moe-1b-7b"):
        assert run(f"presets {name} --json --placement prenorm") == 0
        assert json.loads(capsys.readouterr().out) == found[name]


def test_presets_shows_the_parameters_of_one(capsys):
    assert run("presets 1b --placement sdd-released") == 0
    assert "1,059,274,752" in capsys.readouterr().out


def test_presets_gives_the_config_as_json(capsys):
    assert run("presets nano --json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["d_model"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, capsys, number):
    out = tmp_path / "run"
    process = command(f"train nano {TINY} --steps 100000 --compile false --out", out)
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
    assert run("resume", out, "--steps", step + 2) == 0
    assert f"going on from step {step}" in capsys.readouterr().err
