"""`sdd generate`: its texts, its output on the terminal, and the mistakes that it refuses."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdd.commands.main import main
from sdd.data import builtin_tokenizer
from sdd.evals import generation
from sdd.evals.generation import Continuation, continue_texts
from sdd.evals.text import load_trained

PROMPTS = ["Line 12 says", "A", "It is a truth universally acknowledged, that a single man must be in want of a wife."]


def continued(run: Path, prompts: list[str] | None = None, tokens: int = 12, **settings: Any) -> list[Continuation]:
    return list(continue_texts(load_trained(run), prompts or PROMPTS, tokens, **{"temperature": 0.8} | settings))


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


# --- texts ---


def test_a_sample_depends_on_its_prompt_and_seed_alone(run: Path) -> None:
    together = continued(run, samples=3, seed=5, batch_size=4)
    assert [(one.prompt, one.sample, one.seed) for one in together] == [
        (prompt, sample, 5 + sample) for prompt in PROMPTS for sample in range(3)
    ]
    for one in together:
        [alone] = continued(run, [one.prompt], seed=one.seed)
        assert (alone.text, alone.tokens, alone.finish_reason) == (one.text, one.tokens, one.finish_reason)
    for _, group in itertools.groupby(together, lambda one: one.prompt):
        assert len({one.text for one in group}) == 3


def test_greedy_draws_nothing(run: Path) -> None:
    assert [one.text for one in continued(run, temperature=0)] == [one.text for one in continued(run, top_k=1, seed=9)]


def test_a_text_is_as_long_as_asked_and_begins_as_a_shorter_one(run: Path) -> None:
    long, short = continued(run, tokens=40), continued(run, tokens=12)
    assert {(one.tokens, one.finish_reason) for one in long} == {(40, "length")}
    for one, other in zip(long, short, strict=True):
        assert one.text.startswith(other.text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_stop_string_ends_its_text_only_and_is_cut_off(run: Path) -> None:
    free = continued(run, tokens=30)
    for size, begin in itertools.product((1, 2, 5), (0, 3, 8)):
        stop = free[0].text[begin : begin + size]
        shown: dict[int, str] = dict.fromkeys(range(3), "")

        def listen(index: int, piece: str, reason: str | None, shown: dict[int, str] = shown) -> None:
            shown[index] += piece

        for index, (one, whole) in enumerate(
            zip(continued(run, tokens=30, stop=[stop], listener=listen), free, strict=True)
        ):
            assert one.text == whole.text.split(stop)[0] == shown[index]
            assert one.finish_reason == ("stop" if stop in whole.text else "length")
            assert one.tokens <= 30


def test_the_end_of_text_ends_a_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = builtin_tokenizer()
    # another end of text changes which ids may be drawn, and so the draws
    monkeypatch.setattr(type(tokenizer), "writable", lambda self, vocab_size: np.ones(vocab_size, bool))
    [free] = continued(run, PROMPTS[:1])
    drawn: list[int] = []
    with monkeypatch.context() as listening:
        listening.setattr(generation.TextStream, "push", lambda self, token: drawn.append(token) or "x")
        continued(run, PROMPTS[:1])
    assert len(drawn) == 12
    monkeypatch.setattr(tokenizer, "eos", drawn[5])  # undone: the tokenizer is shared by all who ask for it
    monkeypatch.setattr(generation, "tokenizer_of", lambda config: tokenizer)
    [ended] = continued(run, PROMPTS[:1])
    assert (ended.tokens, ended.finish_reason) == (drawn.index(drawn[5]) + 1, "stop")
    assert free.text.startswith(ended.text)


def test_a_prompt_longer_than_the_context_is_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    continued(run)
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt has 22 tokens: the model reads the last 16, its context"
    ]


# --- the terminal ---


def test_streamed_and_whole_texts_are_the_same_and_those_of_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--samples", 2, "--tokens", 9, "--batch-size", 3]
    streamed = answer(capsys, *words)
    assert answer(capsys, *words, "--no-stream") == streamed
    found = [json.loads(line) for line in answer(capsys, *words, "--json").splitlines()]
    assert streamed == "".join(
        f"--- prompt {index // 2 + 1}, sample {index % 2 + 1} ---\n{one['prompt']}{one['text']}\n"
        for index, one in enumerate(found)
    )
    assert found[3] == {
        "prompt": "A",
        "sample": 1,
        "seed": 1,
        "text": found[3]["text"],
        "tokens": 9,
        "finish_reason": "length",
    }
    assert answer(capsys, run, "--prompt", "A", "--max-tokens", 9, "--seed", 1) == f"A{found[3]['text']}\n"


def test_text_appears_while_it_comes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    push = generation.TextStream.push

    def spy(self: Any, token: int) -> str:
        seen.append(capsys.readouterr().out)
        return push(self, token)

    monkeypatch.setattr(generation.TextStream, "push", spy)
    out = answer(capsys, run, "--prompt", "A", "--tokens", 9)
    whole = "".join(seen) + out
    assert seen[0] == ""
    assert sum(map(bool, seen)) > 4
    monkeypatch.undo()
    assert whole == answer(capsys, run, "--prompt", "A", "--tokens", 9)


def test_prompts_come_from_files_and_stdin(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_bytes("\ufeffé one\r\n\n- two \n".encode())
    objects.write_text('{"prompt": "of\\ntwo lines"}\n\n{"prompt": "b", "other": 1}\n')

    def prompts(*words: object, stdin: bytes = b"") -> list[str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        out = answer(capsys, run, *words, "--tokens", 1, "--json")
        return [json.loads(line)["prompt"] for line in out.splitlines()]

    assert prompts("--prompt", "x", "--prompt-file", lines) == ["x", "é one", "- two "]
    assert prompts("--prompt-file", objects) == ["of\ntwo lines", "b"]
    assert prompts("--prompt-file", "-", stdin=b"one\ntwo\n") == ["one", "two"]
    assert prompts("--prompt", "-", "--prompt", "y", stdin=b"one\ntwo\n") == ["one\ntwo\n", "y"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --prompt TEXT or --prompt-file FILE"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "is not Unicode text"),
        (["--prompt", "-"], "the prompt is empty"),
        (["--prompt-file", "no.txt"], "cannot read no.txt: No such file"),
        (["--prompt-file", "."], "cannot read .: Is a directory"),
        (["--prompt-file", "-"], "there is no prompt in stdin"),
        (["--prompt-file", "latin.txt"], "latin.txt is not UTF-8 text (byte 3)"),
        (["--prompt-file", "bad.jsonl"], 'bad.jsonl, line 2: expected an object like {"prompt": "a text"}'),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2.0"),
        (["--prompt", "a", "--top-k", "0"], "'0' is not a whole number of at least 1"),
        (["--prompt", "a", "--tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--prompt", "a", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["--prompt", "a", "--seed", str(2**63)], "is not a whole number from 0"),
        (["--prompt", "a", "--checkpoint", "3"], "has no checkpoint of step 3: it has 2, 4"),
        (["--prompt", "a", "--sample", "2", "--stream"], "unknown argument --stream (did you mean"),
    ],
)
def test_a_mistake_is_one_clear_line(
    run: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n["prompt"]\n')
    assert main(["generate", str(run), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_another_checkpoint_gives_another_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [run, "--prompt", "Line", "--temperature", 0]
    by_step, by_path, newest = (
        answer(capsys, *words, *more)
        for more in (["--checkpoint", 2], ["--checkpoint", run / "checkpoints" / "step-00000002"], [])
    )
    assert by_step == by_path != newest


def test_a_model_that_is_not_finite_is_a_failed_run(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **settings: Any) -> Any:
        raise FloatingPointError("the model's logits are not finite")

    monkeypatch.setattr(generation, "generate_stream", broken)
    assert main(["generate", str(run), "--prompt", "a"]) == 3
    assert "logits are not finite" in capsys.readouterr().err


def started(run: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sdd", "generate", str(run), "--prompt", "A", "--tokens", "100000", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_printed(run: Path) -> None:
    with started(run) as process:
        assert process.stdout is not None
        first = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).startswith(b"A")
    assert rest.endswith(b"\n")
    assert err == b"sdd: interrupted\n"


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_quietly(run: Path) -> None:
    with started(run) as process:
        assert process.stdout is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0
