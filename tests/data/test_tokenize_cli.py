import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_data import contents, some_documents, write_jsonl
from rich.console import Console

from sdd.commands import tokenize as cli
from sdd.commands.main import main
from sdd.commands.tokenize import Display
from sdd.data import builtin_tokenizer, resolve_data
from sdd.data.shards import Counts
from sdd.data.tokenize_job import Status, TokenizeSettings, tokenize
from sdd.errors import RunFailed, UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", some_documents(60))


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    assert main(["tokenize", str(source), "--out", str(out), "--workers", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == str(out)
    assert result["documents"] == 60
    assert main(["tokenize", str(source), "--out", str(out), "--workers=1"]) == 0
    assert capsys.readouterr().out.startswith(f"done: {result['tokens']:,} tokens of 60 documents")


def test_a_held_out_part_too_small_for_any_preset_is_said(source: Path, tmp_path: Path, capsys):
    for fraction in ("0.001", "0.3"):
        words = ["--out", str(tmp_path / fraction), "--workers", "1", "--validation-fraction", fraction]
        assert main(["tokenize", str(source), *words]) == 0
        assert ("a larger --validation-fraction" in capsys.readouterr().err) == (fraction == "0.001")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "'0' is not a whole number of at least 1"),
        (["--validation-fraction", "2"], "must be at least 0 and below 1"),
        (["--validation-fraction", "nan"], "must be at least 0 and below 1"),
        (["--dtype", "int8"], "choose auto, uint16 or uint32"),
        (["--dtyp", "auto"], "unknown argument --dtyp (did you mean '--dtype'?)"),
        (["--tokenizer", "nowhere.json"], "no tokenizer at nowhere.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(source: Path, tmp_path: Path, words: list[str], message: str, capsys):
    assert main(["tokenize", str(source), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_it_says_how_to_go_on(
    source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    def stop(self: Display, status: Status) -> None:
        if status.text_bytes:
            os.kill(os.getpid(), number)
            time.sleep(10)

    words = ["tokenize", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Display, "show", stop)
        assert main(words) == 130
    assert "interrupted; the same command goes on where it was" in capsys.readouterr().err
    assert main(words) == 0


def test_a_failed_write_exits_3(source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    assert main(["tokenize", str(source), "--out", str(source / "out"), "--workers", "1"]) == 3
    assert capsys.readouterr().err.startswith("sdd: the run failed: cannot write ")


def test_a_terminal_sees_a_bar_and_a_log_sees_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LINES", 0)
    counts = Counts(n_tokens=1_000_000)
    stages = [Status(25, 100, counts, 0, 0.0), Status(50, 100, counts, 2_000_000, 10.0)]
    for terminal in (False, True):
        stream = io.StringIO()
        display = Display(Console(file=stream, force_terminal=terminal, width=100, highlight=False))
        with display.bar:
            for status in stages:
                display.show(status)
        shown = stream.getvalue()
        assert "going on at 25%" in shown
        assert "50%" in shown
        assert "1,000,000 tokens   0.2 MB/s of text" in shown
        assert terminal or "0:20 left" in shown


def test_the_number_of_workers_does_not_matter(source: Path, tmp_path: Path):
    for workers in (1, 2):
        settings = TokenizeSettings(builtin_tokenizer(), workers, chunk_bytes=2000, shard_tokens=3000)
        tokenize([str(source)], tmp_path / str(workers), settings)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1: expected a JSON object"):
        tokenize([str(tmp_path / "bad.jsonl")], tmp_path / "bad", settings)


def test_a_worker_that_dies_is_one_line(source: Path, tmp_path: Path):
    settings = TokenizeSettings(builtin_tokenizer(), workers=2, chunk_bytes=500)
    killed = False

    def kill_one(status: Status) -> None:
        nonlocal killed
        if status.text_bytes and not killed:
            killed = True
            for worker in _workers_of(os.getpid()):
                os.kill(worker, signal.SIGKILL)

    with pytest.raises(RunFailed, match="a worker process was killed, out of memory perhaps: give the same command"):
        tokenize([str(source)], tmp_path / "out", settings, kill_one)
    assert (
        tokenize([str(source)], tmp_path / "out", TokenizeSettings(builtin_tokenizer(), chunk_bytes=500))["documents"]
        == 60
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the workers")
@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_leaves_nobody_behind_and_goes_on(tmp_path: Path, kill: signal.Signals):
    # a signal must not come after the end, so there is much to do; after SIGKILL all of it is done again
    repeats = 7 if kill == signal.SIGKILL else 60
    source, out = write_jsonl(tmp_path / "text.jsonl", some_documents(1000) * repeats), tmp_path / "out"
    words = [sys.executable, "-m", "sdd", "tokenize", str(source), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not _begun(out) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = _workers_of(process.pid)
    assert workers
    if kill == signal.SIGINT:
        os.killpg(process.pid, kill)  # as a terminal does it: every process gets it
    else:
        process.send_signal(kill)
    errors = process.communicate(timeout=60)[1]
    if kill != signal.SIGKILL:
        assert process.returncode == 130, errors
        assert errors == f"sdd: interrupted; the same command goes on where it was, into {out}\n"
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(UserError, match="is not complete"):
        resolve_data(out, context=8)
    if kill == signal.SIGKILL:
        for folder in (out, tmp_path / "whole"):
            tokenize([str(source)], folder, TokenizeSettings(builtin_tokenizer()))
        assert contents(out) == contents(tmp_path / "whole")


def _begun(out: Path) -> bool:
    try:
        return (out / "train-00000.npy.part").stat().st_size > 0
    except FileNotFoundError:
        return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _workers_of(pid: int) -> list[int]:
    """Processes that a fork server of `pid` has started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    return [child for child, parent in parents.items() if parents.get(parent) == pid]
