"""Turn text into a folder of token files, restartable; what `sdd tokenize` and `--data TEXT` run.

The folder's manifest.json says what is tokenised and how; see `sdd.data.shards` for the other files. Work on it goes
on only under the same manifest, so that old and new parts fit together.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from sdd.data.begun import going_on
from sdd.data.cache import Notify
from sdd.data.chunks import FORMAT, Manifest, chunks, cut_of
from sdd.data.fields import BadRecord
from sdd.data.folders import MANIFEST_FILE
from sdd.data.inputs import PART_BYTES, Input, find_inputs
from sdd.data.shards import PROGRESS_FILE, SHARD_TOKENS, SUMMARY_FILE, Counts, Progress, Shards
from sdd.data.token_file import TokenFile, TokenInfo, TokenizerRef, read_model, smallest_dtype
from sdd.data.tokenizer import Tokenizer
from sdd.data.workers import tokenized
from sdd.errors import RunFailed, UserError
from sdd.files import is_stray, lock, write_aside
from sdd.terminal import Interval

VALIDATION_FRACTION = 0.01
_SECONDS_BETWEEN_COMMITS = 1.0
_SKIPPED_NAMED = 5
_OWN_FILES = (".lock", PROGRESS_FILE, "tokenizer.json")


@dataclass(frozen=True)
class TokenizeSettings:
    """How `tokenize` works; for the fields without a description see `Manifest`.

    Attributes:
        tokenizer: the tokenizer.
        workers: processes that tokenise, see `sdd.data.workers.tokenized`; the result does not depend on it.
        dtype: of the tokens; "auto" is the smallest that holds the vocabulary.
        eos: the token that ends a document, its text or its id; None finds the tokenizer's own.
    """

    tokenizer: Tokenizer
    workers: int = 1
    validation_fraction: float = VALIDATION_FRACTION
    text_field: str = "text"
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    eos: str | None = None
    skip_bad: bool = False
    whole_documents: bool = False
    chunk_bytes: int = PART_BYTES
    shard_tokens: int = SHARD_TOKENS


@dataclass(frozen=True)
class Status:
    """How far the work has come.

    Attributes:
        done: how much of `size` has been read.
        size: of all inputs.
        total: counts of all that has been written.
        text_bytes: bytes of text that this call has written.
        seconds: time that this call has taken.
    """

    done: int
    size: int
    total: Counts
    text_bytes: int
    seconds: float


Watch = Callable[[Status], None]


def tokenize(
    names: Sequence[str],
    out: Path,
    settings: TokenizeSettings,
    watch: Watch | None = None,
    notify: Notify | None = None,
) -> dict[str, Any]:
    """Tokenise text, JSON lines, parquet and Hugging Face datasets into a folder that `resolve_data` reads.

    The folder gets train-00000.npy, ..., validation.npy, a json beside each, tokenizer.json and manifest.json. If a
    call is interrupted, the same call goes on where it was; if it is complete, the same call answers at once. The same
    inputs and settings give the same bytes, whatever the number of workers and of interruptions.

    Args:
        names: files, folders, and datasets as hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.
        out: the folder; new, or one that the same call has begun.
        settings: tokenizer, workers, and the rest.
        watch: receives the status before the first chunk and after each.
        notify: receives a line for what is left out, held out by its name or skipped; by default it is logged.

    Returns:
        Counts, files and speed, ready for JSON.

    Raises:
        UserError: inputs that cannot be read, settings that do not fit, or a folder with something else in it.
        RunFailed: the folder cannot be written, or a worker was killed.
    """
    inputs = find_inputs(names, settings.text_field, notify)
    return tokenize_inputs(inputs, out, settings, watch, notify, names)


def tokenize_inputs(
    inputs: Sequence[Input],
    out: Path,
    settings: TokenizeSettings,
    watch: Watch | None = None,
    notify: Notify | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Tokenise inputs that `find_inputs` has found under these names; see `tokenize`."""
    settings = replace(settings, tokenizer=settings.tokenizer.ending_with(settings.eos, "--eos TOKEN"))
    manifest, notify = _manifest(inputs, settings), notify or logging.getLogger(__name__).info
    began = time.monotonic()
    try:
        with _locked(out):
            manifest = manifest.model_copy(update={"format": _format_of(out)})
            manifest, progress = _begin(out, manifest, settings.tokenizer, names)
            text_bytes = _work(out, manifest, settings, progress, watch, notify) if progress else 0
            return _summary(out, manifest, text_bytes, time.monotonic() - began)
    except OSError as error:
        raise RunFailed(
            f"cannot write {error.filename or out}: {error.strerror}; once that is mended the same command goes on"
        ) from None


def _manifest(inputs: Sequence[Input], settings: TokenizeSettings) -> Manifest:
    if not 0 <= settings.validation_fraction < 1:
        raise UserError(f"validation fraction {settings.validation_fraction} must be at least 0 and below 1")
    tokenizer = settings.tokenizer
    dtype = smallest_dtype(tokenizer.vocab_size)
    if settings.dtype == "uint16" != dtype:
        raise UserError(f"{tokenizer.path} has {tokenizer.vocab_size} tokens, more than uint16 holds: take uint32")
    changed = {
        "tokenizer": tokenizer.sha256,
        "eos": tokenizer.eos,
        "dtype": dtype if settings.dtype == "auto" else settings.dtype,
        "inputs": tuple(inputs),
    }
    return Manifest(**{**vars(settings), **changed})


def _format_of(out: Path) -> int:
    """The format in which work on a folder goes on: an earlier one if it was begun so."""
    file = out / MANIFEST_FILE
    begun = read_model(file, Manifest, f"it is damaged: delete {out} and start again").format if file.is_file() else 0
    return begun if 0 < begun < FORMAT else FORMAT


def _begin(
    out: Path, manifest: Manifest, tokenizer: Tokenizer, names: Sequence[str]
) -> tuple[Manifest, Progress | None]:
    """The manifest and the progress to go on with; None if the work is done. A new folder is laid out."""
    file, progress_file = out / MANIFEST_FILE, out / PROGRESS_FILE
    damaged = f"it is damaged: delete {out} and start again"
    if file.is_file():
        before = read_model(file, Manifest, damaged)
        progress = read_model(progress_file, Progress, damaged) if progress_file.is_file() else None
        if progress and progress.position.input >= len(before.inputs):
            raise UserError(f"{progress_file}: there is no such input; {damaged}")
        if progress and progress.model_copy(update={"seconds": 0}) == Progress():  # nothing is done, so nothing binds
            tokenizer.save(out / "tokenizer.json")
            write_aside(file, manifest.model_dump_json(indent=2) + "\n")
            return manifest, progress
        cut = cut_of(tokenizer, before)
        manifest = going_on(out, before, manifest, progress and progress.position, names, cut)
        if progress is None and not (out / SUMMARY_FILE).is_file():
            raise UserError(f"{out} has lost its {PROGRESS_FILE}: delete it and start again")
        if progress and manifest != before:
            write_aside(file, manifest.model_dump_json(indent=2) + "\n")
        return manifest, progress
    inside = [path.name for path in out.iterdir()]
    if other := [name for name in inside if name not in _OWN_FILES and not is_stray(name)]:
        raise UserError(f"{out} is not empty (it holds {other[0]}) and was not begun by this command: name a new one")
    tokenizer.save(out / "tokenizer.json")
    progress = Progress()
    write_aside(progress_file, progress.model_dump_json(indent=2) + "\n")
    write_aside(file, manifest.model_dump_json(indent=2) + "\n")  # last: with it the folder counts as begun
    return manifest, progress


def _work(
    out: Path,
    manifest: Manifest,
    settings: TokenizeSettings,
    progress: Progress,
    watch: Watch | None,
    notify: Notify,
) -> int:
    """Tokenise all that is left; the bytes of text that this took."""
    info = TokenInfo(
        dtype=manifest.dtype,
        eos=manifest.eos,
        vocab_size=settings.tokenizer.vocab_size,
        tokenizer=TokenizerRef(sha256=settings.tokenizer.sha256, file="tokenizer.json"),
    )
    text_before = progress.total().n_bytes
    shards = Shards(out, info, progress, manifest.shard_tokens)
    try:
        try:
            _fill(shards, manifest, settings, watch, notify)
        except BadRecord as error:
            raise UserError(_with_advice(error, settings)) from None
        if not sum(counts.n_tokens for counts in progress.train):
            raise UserError(f"{manifest.inputs[0].name}{' ...' * (len(manifest.inputs) > 1)}: no text to train on")
        shards.finish()
    finally:
        with suppress(OSError):  # a full disk was reported already
            shards.close()
    return progress.total().n_bytes - text_before


def _with_advice(error: BadRecord, settings: TokenizeSettings) -> str:
    if settings.whole_documents:
        return f"{error}; mend it, or sdd tokenize --skip-bad passes over it"
    return f"{error}; mend it or take the file away, or add --skip-bad: the same command then goes on"


def _fill(shards: Shards, manifest: Manifest, settings: TokenizeSettings, watch: Watch | None, notify: Notify) -> None:
    progress, commit = shards.progress, Interval(_SECONDS_BETWEEN_COMMITS)
    began, text_before, seconds_before = time.monotonic(), progress.total().n_bytes, progress.seconds

    def tell() -> None:
        if watch:
            total, seconds = progress.total(), progress.seconds - seconds_before
            watch(Status(progress.position.done, manifest.size, total, total.n_bytes - text_before, seconds))

    tell()
    work = chunks(manifest, progress.position, cut_of(settings.tokenizer, manifest))
    for chunk, tokens in tokenized(work, settings.tokenizer, manifest, settings.workers):
        for why in tokens.skipped[: max(0, _SKIPPED_NAMED - progress.skipped)]:
            notify(f"skipped: {why}")
        shards.append(
            tokens.train,
            tokens.validation,
            chunk.after,
            skipped=len(tokens.skipped),
            without_text=tokens.without_text,
        )
        progress.seconds = seconds_before + time.monotonic() - began
        if commit.due():
            shards.commit()
        tell()


def _summary(out: Path, manifest: Manifest, text_bytes: int, seconds: float) -> dict[str, Any]:
    done = read_model(out / SUMMARY_FILE, Progress, f"it is damaged: delete {out} and start again")
    files = [TokenFile.open(out / name) for name, counts in done.files() if counts.n_tokens]
    total = done.total()
    return {
        "out": str(out),
        "files": [file.path.name for file in files],
        "tokens": total.n_tokens - done.validation.n_tokens,
        "validation_tokens": done.validation.n_tokens,
        "documents": total.n_documents - done.validation.n_documents,
        "text_bytes": total.n_bytes,
        "lost_bytes": total.n_lost,
        "skipped": done.skipped,
        "without_text": done.without_text,
        "dtype": manifest.dtype,
        "eos": manifest.eos,
        "vocab_size": files[0].vocab_size,
        "seconds": done.seconds,
        "mb_per_second": text_bytes / 1e6 / seconds if text_bytes else None,
    }


def _locked(out: Path) -> IO[str]:
    """Make the folder, and keep other processes from writing into it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    return lock(out / ".lock")
