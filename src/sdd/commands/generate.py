"""`sdd generate`: texts on the terminal while they come."""

import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from sdd.commands.parser import Parser, positive_int, whole_number
from sdd.errors import RunFailed, UserError
from sdd.evals.generation import FinishReason, continue_texts
from sdd.evals.text import load_trained


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_known(args)
    prompts = [_read("-") if prompt == "-" else prompt for prompt in options.prompt]
    prompts += [] if options.prompt_file is None else _prompts(options.prompt_file)
    if not prompts:
        raise UserError("there is nothing to continue: give --prompt TEXT or --prompt-file FILE")
    if "" in options.stop:
        raise UserError("--stop is empty: give at least one character")
    printer = _Printer(prompts, options.samples)
    stream = not (options.json or options.no_stream)
    found = continue_texts(
        load_trained(options.run, options.checkpoint),
        prompts,
        options.max_tokens,
        samples=options.samples,
        seed=options.seed,
        stop=options.stop,
        batch_size=options.batch_size,
        listener=printer.add if stream else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    try:
        for index, continuation in enumerate(found):
            if options.json:
                print(json.dumps(asdict(continuation)), flush=True)
            elif not stream:
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
    """Prints continuations in order: the first unfinished one while it comes, the others when their turn has come.

    Args:
        prompts: what is continued.
        samples: continuations of each prompt.
    """

    def __init__(self, prompts: list[str], samples: int) -> None:
        self._prompts, self._samples = prompts, samples
        self._turn = 0
        self._begun = False  # whether a line of the one in turn is open
        self._waiting: dict[int, str] = defaultdict(str)
        self._finished: set[int] = set()

    def add(self, index: int, text: str, finish_reason: FinishReason | None) -> None:
        """Take new text of a continuation."""
        self._waiting[index] += text
        if finish_reason is not None:
            self._finished.add(index)
        while self._turn in self._waiting:
            print("" if self._begun else self._heading(), self._waiting.pop(self._turn), sep="", end="", flush=True)
            self._begun = True
            if self._turn not in self._finished:
                break
            self.end_line()
            self._turn += 1

    def end_line(self) -> None:
        """End the line of the one in turn."""
        if self._begun:
            print(flush=True)
        self._begun = False

    def _heading(self) -> str:
        """The prompt, below its number if there are several."""
        prompt, sample = divmod(self._turn, self._samples)
        parts = [f"prompt {prompt + 1}"] * (len(self._prompts) > 1) + [f"sample {sample + 1}"] * (self._samples > 1)
        return (f"--- {', '.join(parts)} ---\n" if parts else "") + self._prompts[prompt]


def _prompts(file: str) -> list[str]:
    """The prompts of a file, one a line; empty lines are skipped."""
    lines = [line.removesuffix("\r") for line in _read(file).split("\n")]
    if Path(file).suffix == ".jsonl":
        prompts = [_json_prompt(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"there is no prompt in {_name(file)}: expected one a line")
    return prompts


def _json_prompt(where: str, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{where}: expected an object like {{"prompt": "a text"}}')
    return prompt


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


def _parser() -> Parser:
    parser = Parser("sdd generate", "Continue texts with a trained run.", allow_abbrev=True)
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run directory")
    about = "a text to continue; repeatable; - reads stdin"
    add("--prompt", metavar="TEXT", action="append", default=[], help=about)
    about = 'texts to continue, one a line; in a .jsonl file {"prompt": TEXT} a line; - reads lines of stdin'
    add("--prompt-file", metavar="FILE", help=about)
    about = "how many tokens to add at most (default 100)"
    add("--max-tokens", "--tokens", type=positive_int, default=100, metavar="N", help=about)
    add("--samples", type=positive_int, default=1, metavar="N", help="texts a prompt (default 1)")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    add("--top-k", type=positive_int, help="sample among the k most likely tokens")
    add("--top-p", type=float, help="sample among the most likely tokens of this total probability")
    about = "of the first sample; each further one has the next (default 0)"
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help=about)
    about = "ends a text and is cut off; repeatable"
    add("--stop", metavar="TEXT", action="append", default=[], help=about)
    add("--checkpoint", metavar="STEP|PATH", help="another than the newest whole checkpoint")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="texts at once (default 8)")
    add("--no-stream", action="store_true", help="print a text when it is finished")
    add("--json", action="store_true", help="print one JSON object a text, when it is finished")
    return parser
