"""`sdd generate`: its options, and texts on the terminal while they come."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sdd.commands.parser import Parser, positive_int
from sdd.errors import RunFailed, UserError
from sdd.evals.generation import FinishReason, continue_texts
from sdd.evals.text import load_trained


def main(args: list[str]) -> int:
    """Run `sdd generate`; returns its exit code."""
    options = _parser().parse_known(args)
    prompts = [_read("-") if prompt == "-" else prompt for prompt in options.prompt]
    if options.prompt_file is not None:
        prompts += _prompts(options.prompt_file)
    if not prompts:
        raise UserError("there is nothing to continue: give --prompt TEXT or --prompt-file FILE")
    if "" in options.stop:
        raise UserError("--stop is empty: give at least one character")
    trained = load_trained(options.run, options.checkpoint)
    printer = _Printer(prompts, options.samples)
    found = continue_texts(
        trained,
        prompts,
        options.max_tokens,
        samples=options.samples,
        seed=options.seed,
        stop=options.stop,
        batch_size=options.batch_size,
        listener=None if options.json or options.no_stream else printer.add,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    try:
        for index, continuation in enumerate(found):
            if options.json:
                print(json.dumps(asdict(continuation)), flush=True)
            elif options.no_stream:
                printer.add(index, continuation.text, continuation.finish_reason)
    except ValueError as error:
        raise UserError(str(error)) from None
    except FloatingPointError as error:
        raise RunFailed(str(error)) from None
    except KeyboardInterrupt:
        printer.end_line()
        raise
    return 0


class _Printer:
    """Writes continuations one after the other: the first unfinished one while it comes, the others in their turn."""

    def __init__(self, prompts: list[str], samples: int) -> None:
        self._prompts, self._samples = prompts, samples
        self._turn = 0
        self._begun = False  # whether the prompt of the one in turn stands there
        self._waiting: dict[int, str] = defaultdict(str)
        self._finished: set[int] = set()

    def add(self, index: int, text: str, finish_reason: FinishReason | None) -> None:
        """Take new text of a continuation."""
        self._waiting[index] += text
        if finish_reason is not None:
            self._finished.add(index)
        while self._turn in self._waiting:
            self._show(self._waiting.pop(self._turn))
            if self._turn not in self._finished:
                break
            self.end_line()
            self._turn += 1
        sys.stdout.flush()

    def end_line(self) -> None:
        """End the line of the one in turn."""
        if self._begun:
            print(flush=True)
        self._begun = False

    def _show(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            print(self._heading() + self._prompts[self._turn // self._samples], end="")
        print(text, end="")

    def _heading(self) -> str:
        prompt, sample = divmod(self._turn, self._samples)
        parts = [f"prompt {prompt + 1}"] * (len(self._prompts) > 1) + [f"sample {sample + 1}"] * (self._samples > 1)
        return f"--- {', '.join(parts)} ---\n" if parts else ""


def _parser() -> Parser:
    parser = Parser(prog="sdd generate", description="Continue texts with a trained run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="a text to continue; repeatable; - reads stdin"
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='texts to continue, one a line; in a .jsonl file {"prompt": TEXT} a line; - reads lines of stdin',
    )
    parser.add_argument(
        "--max-tokens",
        "--tokens",
        type=positive_int,
        default=100,
        metavar="N",
        help="how many tokens to add at most (default 100)",
    )
    parser.add_argument("--samples", type=positive_int, default=1, metavar="N", help="texts a prompt (default 1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    parser.add_argument("--top-k", type=positive_int, help="sample among the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="sample among the most likely tokens of this total probability")
    parser.add_argument("--seed", type=_seed, default=0, help="of the first sample, the next has one more (default 0)")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="ends a text and is cut off; repeatable"
    )
    parser.add_argument("--checkpoint", metavar="STEP|PATH", help="another than the newest whole checkpoint")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="texts at once (default 8)")
    parser.add_argument("--no-stream", action="store_true", help="print a text when it is finished")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text, when it is finished")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _prompts(file: str) -> list[str]:
    """The prompts of a file; lines without any character are passed over."""
    lines = [line.removesuffix("\r") for line in _read(file).split("\n")]
    prompts = list(_json_prompts(file, lines)) if Path(file).suffix == ".jsonl" else list(filter(None, lines))
    if not prompts:
        raise UserError(f"there is no prompt in {_name(file)}: expected one a line")
    return prompts


def _json_prompts(file: str, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{file}, line {number}: expected an object like {{"prompt": "a text"}}')
        yield prompt


def _read(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {_name(file)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_name(file)} is not UTF-8 text (byte {error.start})") from None


def _name(file: str) -> str:
    return "stdin" if file == "-" else file
