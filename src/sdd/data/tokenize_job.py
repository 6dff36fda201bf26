"""`sdd tokenize` without its command line: inputs to token files, restartable.

The folder's manifest.json says what is tokenised and how; see `sdd.data.shards` for the other files. Work on it goes
on only under the same manifest, so that what is there and what comes fit together.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pydantic

from sdd.data.chunks import Rules, chunks
from sdd.data.inputs import PART_BYTES, find_inputs
from sdd.data.shards import SHARD_TOKENS, SUMMARY_FILE, Counts, Progress, Shards
from sdd.data.source import PROGRESS_FILE
from sdd.data.token_file import DtypeName, TokenFile, TokenInfo, TokenizerRef
from sdd.data.tokenizer import EOS_NAMES, Tokenizer
from sdd.data.workers import tokenized
from sdd.errors import RunFailed, UserError
from sdd.files import lock, write_aside

MANIFEST_FILE = "manifest.json"
VALIDATION_FRACTION = 0.01
_FORMAT = 1  # to be raised when the same manifest gives other tokens
_SECONDS_BETWEEN_COMMITS = 1.0
_OWN_FILES = (".lock", PROGRESS_FILE, f".tmp-{PROGRESS_FILE}", f".tmp-{MANIFEST_FILE}", "tokenizer.json")


class _InputEntry(pydantic.BaseModel):
    name: str
    kind: str
    size: int
    stamp: str


class Manifest(pydantic.BaseModel):
    """manifest.json: all that the tokens depend on."""

    format: int = _FORMAT
    tokenizer: str
    eos: int
    dtype: DtypeName
    text_field: str
    validation_fraction: float
    skip_bad: bool
    chunk_bytes: int
    shard_tokens: int
    inputs: list[_InputEntry]


@dataclass(frozen=True)
class TokenizeSettings:
    """How `tokenize` goes about it.

    Attributes:
        tokenizer: the tokenizer.
        workers: processes that tokenise, each on one core; the result does not depend on it.
        validation_fraction: share of the text that is held out.
        text_field: field of JSON lines, column of parquet and of datasets that holds the text.
        dtype: of the tokens; "auto" is the smallest that holds the vocabulary.
        eos: the token that ends a document, its text or its id; None finds the tokenizer's own.
        skip_bad: pass over records that are no text, instead of refusing them.
        chunk_bytes: how much text makes a unit of work.
        shard_tokens: a training file that has so many is followed by a new one.
    """

    tokenizer: Tokenizer
    workers: int = 1
    validation_fraction: float = VALIDATION_FRACTION
    text_field: str = "text"
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    eos: str | None = None
    skip_bad: bool = False
    chunk_bytes: int = PART_BYTES
    shard_tokens: int = SHARD_TOKENS


@dataclass(frozen=True)
class Status:
    """Where the work stands.

    Attributes:
        done: how much of `size` has been read.
        size: of all inputs.
        total: what has been written, over all sessions.
        text_bytes: of it, the text of this session.
        seconds: that this session has taken.
    """

    done: int
    size: int
    total: Counts
    text_bytes: int
    seconds: float


def tokenize(
    names: Sequence[str], out: Path, settings: TokenizeSettings, watch: Callable[[Status], None] | None = None
) -> dict[str, Any]:
    """Tokenise text, JSON lines, parquet and Hugging Face datasets into a folder that `resolve_data` reads.

    The folder gets train-00000.npy, ..., validation.npy, a json beside each, tokenizer.json and manifest.json. An
    interrupted call is gone on with by the same call; one that is complete answers at once. Of the same inputs and
    settings come the same bytes, whatever the number of workers and of interruptions.

    Args:
        names: files, folders, and datasets as hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.
        out: the folder; new, or one that the same call has begun.
        settings: how.
        watch: is told where the work stands, before the first unit of it and after each.

    Returns:
        Counts, files and speed, ready for JSON.

    Raises:
        UserError: inputs that cannot be read, settings that do not fit, or a folder with something else in it.
        RunFailed: the folder cannot be written, or a worker was killed.
    """
    rules = _rules(names, settings)
    manifest = _manifest(rules, settings)
    began = time.monotonic()
    try:
        with _locked(out):
            progress = _begin(out, manifest, settings.tokenizer)
            before = None
            if progress is not None:
                before = progress.total()
                _work(out, rules, settings, progress, watch)
            return _summary(out, manifest, before, time.monotonic() - began)
    except OSError as error:
        raise RunFailed(
            f"cannot write {error.filename or out}: {error.strerror}; once that is mended the same command goes on"
        ) from None


def _rules(names: Sequence[str], settings: TokenizeSettings) -> Rules:
    if not 0 <= settings.validation_fraction < 1:
        raise UserError(f"validation fraction {settings.validation_fraction} must be at least 0 and below 1")
    tokenizer = settings.tokenizer
    dtype: DtypeName = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    if settings.dtype == "uint16" and dtype == "uint32":
        raise UserError(f"{tokenizer.path} has {tokenizer.vocab_size} tokens, more than uint16 holds: take uint32")
    return Rules(
        inputs=tuple(find_inputs(names, settings.text_field)),
        field=settings.text_field,
        dtype=dtype if settings.dtype == "auto" else settings.dtype,
        eos=_eos(tokenizer, settings.eos),
        validation_fraction=settings.validation_fraction,
        skip_bad=settings.skip_bad,
    )


def _eos(tokenizer: Tokenizer, named: str | None) -> int:
    if named is None:
        if tokenizer.eos is None:
            raise UserError(
                f"{tokenizer.path} has none of the usual end-of-text tokens ({', '.join(EOS_NAMES)}): name its own "
                "with --eos TOKEN"
            )
        return tokenizer.eos
    found = int(named) if named.isdecimal() else tokenizer.token_id(named)  # nobody ends a text with a digit
    if found is None or found >= tokenizer.vocab_size:
        raise UserError(f"{tokenizer.path} has no token {named!r} to end a text with")
    return found


def _manifest(rules: Rules, settings: TokenizeSettings) -> Manifest:
    return Manifest(
        tokenizer=settings.tokenizer.sha256,
        eos=rules.eos,
        dtype=rules.dtype,
        text_field=rules.field,
        validation_fraction=rules.validation_fraction,
        skip_bad=rules.skip_bad,
        chunk_bytes=settings.chunk_bytes,
        shard_tokens=settings.shard_tokens,
        inputs=[_InputEntry(**source.as_dict()) for source in rules.inputs],
    )


def _begin(out: Path, manifest: Manifest, tokenizer: Tokenizer) -> Progress | None:
    """Where to start or go on; None if the work is done. A new folder is laid out."""
    file, progress_file = out / MANIFEST_FILE, out / PROGRESS_FILE
    if file.is_file():
        _check_same(out, _read(file, Manifest), manifest)
        if not progress_file.is_file():
            return _done(out)
        progress = _read(progress_file, Progress)
        if progress.position.input >= len(manifest.inputs):
            raise UserError(f"{progress_file} is damaged (there is no such input): delete {out} and start again")
        return progress
    if other := [path.name for path in out.iterdir() if path.name not in _OWN_FILES]:
        raise UserError(f"{out} is not empty (it holds {other[0]}) and was not begun by this command: name a new one")
    tokenizer.save(out / "tokenizer.json")
    progress = Progress()
    write_aside(progress_file, progress.model_dump_json(indent=2) + "\n")
    write_aside(file, manifest.model_dump_json(indent=2) + "\n")  # last: with it the folder counts as begun
    return progress


def _done(out: Path) -> None:
    if not (out / SUMMARY_FILE).is_file():
        raise UserError(f"{out} has lost its {PROGRESS_FILE}: delete it and start again")


def _read(file: Path, model: type[pydantic.BaseModel]) -> Any:
    try:
        return model.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        message = " ".join(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".split())[:300]
        raise UserError(f"{file} is damaged ({message}): delete {file.parent} and start again") from None


def _check_same(out: Path, before: Manifest, now: Manifest) -> None:
    advice = f"give the same inputs and settings again, or another folder than {out}"
    for name in Manifest.model_fields:
        had, has = getattr(before, name), getattr(now, name)
        if name != "inputs" and had != has:
            raise UserError(f"{out} was begun with {name.replace('_', ' ')} {had}, now it is {has}: {advice}")
    had, has = ([source.name for source in manifest.inputs] for manifest in (before, now))
    if had != has:
        changed = [f"{name} is new" for name in has if name not in had]
        changed += [f"{name} is missing" for name in had if name not in has]
        raise UserError(f"{out} was begun with other inputs ({(changed or ['another order'])[0]}): {advice}")
    for old, new in zip(before.inputs, now.inputs, strict=True):
        if old != new:
            what = f"had size {old.size}, now {new.size}" if old.size != new.size else "was written again"
            raise UserError(f"{out} was begun with another {new.name} (it {what}): bring that back, or {advice}")


def _work(
    out: Path, rules: Rules, settings: TokenizeSettings, progress: Progress, watch: Callable[[Status], None] | None
) -> None:
    info = TokenInfo(
        dtype=rules.dtype,
        eos=rules.eos,
        vocab_size=settings.tokenizer.vocab_size,
        tokenizer=TokenizerRef(sha256=settings.tokenizer.sha256, file="tokenizer.json"),
    )
    shards = Shards(out, info, progress, settings.shard_tokens)
    try:
        _fill(shards, rules, settings, watch)
        if not sum(counts.n_tokens for counts in progress.train):
            raise UserError(f"{rules.inputs[0].name}{' ...' * (len(rules.inputs) > 1)}: no text to train on")
        shards.finish()
    finally:
        with suppress(OSError):  # a full disk was told of already
            shards.close()


def _fill(shards: Shards, rules: Rules, settings: TokenizeSettings, watch: Callable[[Status], None] | None) -> None:
    progress = shards.progress
    began = committed = time.monotonic()
    text_before, seconds_before = progress.total().n_bytes, progress.seconds

    def tell() -> None:
        if watch:
            total, seconds = progress.total(), progress.seconds - seconds_before
            watch(Status(progress.position.done, rules.size, total, total.n_bytes - text_before, seconds))

    tell()
    work = chunks(rules.inputs, rules.field, progress.position, settings.chunk_bytes)
    for chunk, tokens in tokenized(work, settings.tokenizer, rules, settings.workers):
        shards.append(tokens.train, tokens.validation, chunk.after, tokens.skipped)
        now = time.monotonic()
        progress.seconds = seconds_before + now - began
        if now - committed >= _SECONDS_BETWEEN_COMMITS:
            shards.commit()
            committed = now
        tell()
    shards.commit()


def _summary(out: Path, manifest: Manifest, before: Counts | None, seconds: float) -> dict[str, Any]:
    done: Progress = _read(out / SUMMARY_FILE, Progress)
    files = [TokenFile.open(out / name) for name, counts in done.files() if counts.n_tokens]
    total, session = done.total(), done.total().n_bytes - before.n_bytes if before else 0
    return {
        "out": str(out),
        "files": [file.path.name for file in files],
        "tokens": total.n_tokens - done.validation.n_tokens,
        "validation_tokens": done.validation.n_tokens,
        "documents": total.n_documents - done.validation.n_documents,
        "text_bytes": total.n_bytes,
        "skipped": done.skipped,
        "dtype": manifest.dtype,
        "eos": manifest.eos,
        "vocab_size": files[0].vocab_size,
        "seconds": done.seconds,
        "mb_per_second": session / 1e6 / seconds if session else None,
    }


def _locked(out: Path) -> IO[str]:
    """Make the folder, and keep other processes from writing into it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    return lock(out / ".lock")
