"""Downstream tasks on a model: score what is not yet known, and sum up."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdd.errors import Interrupted, UserError
from sdd.evals.accuracy import summarise
from sdd.evals.answers import Answers
from sdd.evals.likelihood import encode_pairs, score
from sdd.evals.requests import Task
from sdd.evals.scorer import Scorer
from sdd.files import lock

#: Told the task, and the tokens scored and to be scored of it in this session.
Progress = Callable[[str, int, int], None]


def run_tasks(
    model: Scorer, tasks: Sequence[Task], folder: Path, *, batch_size: int = 16, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Score the requests of tasks and return the numbers of each, see `sdd.evals.accuracy.summarise`.

    Scores are written into `folder` after each batch, and read from there.

    Args:
        model: the model.
        tasks: read by `load_task`.
        folder: of the scores; made if missing.
        batch_size: the most requests a forward pass.
        progress: is told what is done now and then.

    Raises:
        UserError: if a request gives no token, or the folder cannot be written.
        Interrupted: after Ctrl-C; the scores so far are kept.
        RunFailed: if the model's logits are not finite.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / "lock")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; name another folder with --out") from None
    with held:
        return {task.name: _run_task(model, task, folder, batch_size, progress) for task in tasks}


def _run_task(model: Scorer, task: Task, folder: Path, batch_size: int, progress: Progress | None) -> dict[str, Any]:
    answers = Answers(folder, task.name, model.key)
    texts = dict.fromkeys(text for document in task.documents for text in (*document.choices, *document.unconditional))
    missing = [text for text in texts if answers.get(text) is None]
    try:
        pairs = encode_pairs(model, missing)
        done, total = 0, sum(len(pair.ids) for pair in pairs)
        if progress is not None:
            progress(task.name, done, total)
        for indices, scores in score(model, pairs, batch_size):
            answers.add(zip((missing[index] for index in indices), scores, strict=True))
            done += sum(len(pairs[index].ids) for index in indices)
            if progress is not None:
                progress(task.name, done, total)
    except KeyboardInterrupt:
        known = sum(answers.get(text) is not None for text in texts)
        raise Interrupted(
            f"interrupted in {task.name}: {known:,} of {len(texts):,} scores are kept in {answers.path}; the same "
            "command goes on"
        ) from None
    found = {text: known for text in texts if (known := answers.get(text)) is not None}
    return summarise(task, found)
