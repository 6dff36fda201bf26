"""`sdd tokenize`: MB of text a second and a core, and peak memory on one and four times the data."""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _record import write_result
from sdd.data import Tokenizer, builtin_tokenizer
from sdd.data.spec import CLASSICS


def run(inputs: list[str], tokenizer: Path, workers: int) -> dict[str, Any]:
    """One whole command: its own numbers, and what the system counted for it."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["tokenize", *inputs, "--out", f"{folder}/out", "--tokenizer", str(tokenizer), "--json"]
        command = [sys.executable, "-m", "sdd", *words, "--workers", str(workers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout
            answer = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    result = json.loads(answer)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "workers": workers,
        "text_mb": result["text_bytes"] / 1e6,
        "tokens": result["tokens"] + result["validation_tokens"],
        "seconds": result["seconds"],
        "mb_per_second": result["mb_per_second"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * unit / 1e6,
    }


def main() -> None:
    """Measure and write benchmarks/results/tokenize_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="*", default=[CLASSICS], help="default: the built-in corpus")
    parser.add_argument("--tokenizer", type=Path, default=builtin_tokenizer().path, help="default: the built-in one")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the last run (default: all cores)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny.txt"
        tiny.write_text("a few words")
        startup = run([str(tiny)], args.tokenizer, workers=1)
    runs = []
    for copies, workers in ((1, 1), (4, 1), (1, args.workers)):
        found = {"copies": copies, **run(args.inputs * copies, args.tokenizer, workers)}
        if workers == 1:  # of several the system counts only those that the command itself has waited for
            found["mb_per_cpu_second"] = found["text_mb"] / (found["cpu_seconds"] - startup["cpu_seconds"])
        runs.append(found)
        print(f"{copies} x the data, {workers} workers: {found['mb_per_second']:.2f} MB/s, {found['peak_mb']:.0f} MB")
    file = write_result(
        "tokenize_speed",
        {
            "what": "sdd tokenize, whole commands; peak_mb is the largest process, its startup included",
            "inputs": [Path(name).name for name in args.inputs],
            "tokenizer": args.tokenizer.name,
            "vocab_size": Tokenizer.load(args.tokenizer).vocab_size,
            "tokenizers": importlib.metadata.version("tokenizers"),
            "cores": os.cpu_count(),
            "startup": {name: startup[name] for name in ("cpu_seconds", "peak_mb")},
            "runs": runs,
        },
    )
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
