"""The scores of a task on the disk while they are computed: an interrupted evaluation goes on where it stopped.

A line is `{"key", "logprob", "greedy", "tokens", "cut"}`; the key is a hash of context and continuation. So scores are
found again after a task's file has changed or grown, and texts that are the same are scored once. The file's name
holds a hash of what else the scores depend on: weights, tokenizer and precision.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdd.evals.likelihood import Score
from sdd.evals.requests import Text
from sdd.evals.scorer import digest
from sdd.files import naming, number, read_json_lines


def key_of(text: Text) -> str:
    """What identifies a request."""
    return digest(*text)[:20]


class Answers:
    """The scores of one task by one model.

    Args:
        folder: where the file is; made if missing.
        task: its name.
        model: what the scores depend on beside the texts.

    Attributes:
        path: the file.
    """

    def __init__(self, folder: Path, task: str, model: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{task.replace('/', '-')}-{model[:12]}.jsonl"
        self._found = dict(map(_score, read_json_lines(self.path))) if self.path.exists() else {}
        self._found.pop("", None)

    def get(self, text: Text) -> Score | None:
        """The score of a text, if it is known."""
        return self._found.get(key_of(text))

    def add(self, scored: Iterable[tuple[Text, Score]]) -> None:
        """Keep scores, and write them.

        Raises:
            OSError: if the disk refuses.
        """
        rows = {key_of(text): score for text, score in scored}
        self._found |= rows
        lines = [json.dumps({"key": key, **score._asdict()}) + "\n" for key, score in rows.items()]
        with naming(self.path), self.path.open("ab+") as file:
            whole = "".join(lines).encode()
            file.seek(0, 2)
            if file.tell():  # a killed process may have left a line unfinished
                file.seek(-1, 2)
                whole = whole if file.read(1) == b"\n" else b"\n" + whole
            file.write(whole)


def _score(row: dict[str, Any]) -> tuple[str, Score]:
    """Key and score of a line; no key if the line holds something else."""
    key, logprob, tokens, cut = row.get("key"), number(row.get("logprob")), row.get("tokens"), row.get("cut")
    if not (isinstance(key, str) and math.isfinite(logprob) and isinstance(tokens, int) and isinstance(cut, int)):
        return "", Score(0.0, False, 0, 0)
    return key, Score(logprob, row.get("greedy") is True, tokens, cut)
