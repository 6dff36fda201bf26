"""Find the data that the user names (`--data`), and tokenise them into the cache if they are text."""

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sdd.data.cache import Notify, cached
from sdd.data.inputs import Input, find_inputs, token_files
from sdd.data.mixture import MixturePart, mixed_validation
from sdd.data.shards import PROGRESS_FILE
from sdd.data.spec import CLASSICS, Entry, entries, existing
from sdd.data.token_file import TokenFile, check_length
from sdd.data.tokenize_job import TokenizeSettings, tokenize_inputs
from sdd.data.tokenizer import Tokenizer, builtin_tokenizer
from sdd.errors import UserError
from sdd.terminal import counted

VALIDATION_FRACTION = 0.05  # of text that is not tokenised beforehand
_VALIDATION_STEMS = ("validation", "val")
_HELD_OUT_WINDOWS = 0.01
_CACHE_FORMAT = 1  # to be raised when the same text and tokenizer give other token files
_ONE_FILE = 2**62


@dataclass(frozen=True, eq=False)
class DataSource:
    """Tokens to train on and to validate with, and their vocabulary.

    `parts` are the sources of a mixture; data that are no mixture have one part. `tokenizer` is None if only tokens are
    known, `eos` if the vocabulary has no end-of-text token.
    """

    name: str
    parts: tuple[MixturePart, ...]
    validation: TokenFile
    tokenizer: Tokenizer | None
    vocab_size: int
    eos: int | None

    @property
    def train(self) -> list[TokenFile]:
        """The training files of all parts."""
        return [file for part in self.parts for file in part.files]

    @property
    def n_tokens(self) -> int:
        """The number of training tokens."""
        return sum(len(file) for file in self.train)

    @cached_property
    def listing(self) -> list[dict[str, Any]]:
        """Name, number of tokens and hash of each file as they were first found, ready for JSON."""
        files = [(f"{part.name}/{file.path.name}", file) for part in self.parts for file in part.files]
        files.append((f"held out/{self.validation.path.name}", self.validation))
        return [{"file": name, "tokens": len(file), "hash": file.fingerprint()} for name, file in files]

    def fingerprint(self) -> str:
        """A cheap hash of the tokens. A resumed run compares it to find out whether its data have changed."""
        text = "".join(entry["hash"] for entry in self.listing)
        if len(self.parts) > 1:
            text += "".join(f" {part.weight}x{len(part.files)}" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()

    def changes(self, before: Any) -> str:
        """The differences from an earlier `listing`, in a few words."""
        try:
            then = {entry["file"]: (entry["tokens"], entry["hash"]) for entry in before}
        except (TypeError, KeyError):
            return "they differ"
        now = {entry["file"]: (entry["tokens"], entry["hash"]) for entry in self.listing}
        found = [f"{name} is missing" for name in then if name not in now]
        found += [f"{name} is new" for name in now if name not in then]
        for name in [name for name in now if now[name] != then.get(name, now[name])]:
            (had, _), (has, _) = then[name], now[name]
            found.append(f"{name} had {had} tokens, has {has}" if had != has else f"{name} holds other tokens")
        return "; ".join(found[:3]) + "; ..." * (len(found) > 3) if found else "order or weights differ"


@dataclass(frozen=True)
class _Given:
    """The arguments of `resolve_data` that hold for every source."""

    tokenizer: Tokenizer | None
    context: int
    dtype: str | None
    eos: int | str | None
    vocab_size: int | None
    notify: Notify | None

    def say(self, line: str) -> None:
        """Say a line about what was named, once in a process if it is only logged."""
        (self.notify or _log_once)(line)


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger(__name__).info(line)


def resolve_data(
    spec: str | Path | None = None,
    tokenizer: str | Path | None = None,
    *,
    context: int,
    dtype: str | None = None,
    eos: int | str | None = None,
    vocab_size: int | None = None,
    notify: Notify | None = None,
) -> DataSource:
    """Find the data that `spec` names, and tokenise them if they are text.

    Args:
        spec: None or "classics" for the built-in corpus; or one path, or several separated by commas, of
            - token files (.npy, .bin; with `dtype` also names that say no kind), or a directory of them. The file
              `validation.npy` or `val.bin`, among them or beside them, is the validation part, all others are trained
              on. Without it the last 1% of the last file's windows (at least one) is held out;
            - text, or a directory of it: every file that `sdd.data.inputs` takes. It is tokenised into the cache,
              about 5% of it held out (see `sdd.data.text.TailSplit`).

            A mixture is such paths with weights, `a.npy:0.7,texts:0.3`, or a .json file `{"sources": [{"path": ...,
            "weight": ...}, ...]}` with paths relative to it, or a directory that holds it as mixture.json. Weights are
            shares of the tokens. A part of each source is held out; these parts are mixed in the same shares.
        tokenizer: path of a tokenizer.json; by default the token files' own, or the built-in one for text.
        context: tokens of input in a sample; both parts must have room for one.
        dtype: of token files without a json.
        eos: id or text of the end-of-text token, for text whose tokenizer has none of the usual names and for token
            files whose json does not say.
        vocab_size: of token files whose json does not say and whose tokenizer is not known.
        notify: receives one line before work that takes a while; by default it is logged.

    Raises:
        UserError: there are no such data, they are damaged, or there are too few.
    """
    own = Tokenizer.load(tokenizer) if tokenizer else None
    given = _Given(own, context, dtype, eos, vocab_size, notify)
    named = entries(CLASSICS if spec is None else str(spec))
    sources = [_resolve(group, given) for group in ([named] if named[0].weight is None else [[one] for one in named])]
    for source in sources:
        check_length(f"training part of {source.name}", source.train, context)
        _check_validation(source, context)
        for file in (*source.train, source.validation):
            file.check_ids()
    return sources[0] if len(sources) == 1 else _mixed(named, sources, context)


def _check_validation(source: DataSource, context: int) -> None:
    try:
        check_length(f"validation part of {source.name}", [source.validation], context)
    except UserError as error:
        raise UserError(f"{error}, or hold out more (sdd tokenize --validation-fraction)") from None


def classics(tokenizer: Tokenizer | None = None, notify: Notify | None = None) -> tuple[TokenFile, TokenFile]:
    """Training and validation tokens of the built-in corpus, tokenised on first use (seconds) and kept in the cache.

    The classics are English prose of four kinds: State of the Union addresses, Moby Dick, five Jane Austen novels, the
    King James Bible (sources and licences in assets/README.md). The last 5% of each document is held out, by the rule
    for all text, `sdd.data.text.TailSplit`. The 221 addresses are in the order of time. Their last 5% as a whole would
    be the most recent ones, and the loss on them would also measure two centuries of change in the language. Tails of
    all eras have the distribution of the training text.

    Args:
        tokenizer: the built-in one by default.
        notify: receives one line before the work; by default it is logged.
    """
    return _cached_tokens(CLASSICS, find_inputs([str(existing(CLASSICS))]), tokenizer or builtin_tokenizer(), notify)


def _cached_tokens(
    name: str, inputs: Sequence[Input], tokenizer: Tokenizer, notify: Notify | None
) -> tuple[TokenFile, TokenFile]:
    """The training and validation tokens of text, tokenised on first use and kept in the cache.

    The cache's entry is found by a hash of the inputs' contents and of the tokenizer.

    Raises:
        UserError: text that cannot be read, or too little of it.
    """
    notify = notify or logging.getLogger(__name__).info
    settings = TokenizeSettings(
        tokenizer,
        workers=0,
        validation_fraction=VALIDATION_FRACTION,
        eos=None if tokenizer.eos is None else str(tokenizer.eos),
        whole_documents=True,
        shard_tokens=_ONE_FILE,
    )

    def build(folder: Path) -> None:
        tokenizer.ending_with(None, "--data.eos TOKEN")
        size = sum(source.size for source in inputs) / 1e6
        notify(f"tokenising {name} ({size:.1f} MB on disk) into {folder.parent}, once")
        result = tokenize_inputs(inputs, folder, settings)
        if result["without_text"]:
            notify(f"{name}: {counted(result['without_text'], 'record')} without text passed over")
        if not result["validation_tokens"]:
            raise UserError(
                f"{inputs[0].name}{' ...' * (len(inputs) > 1)}: too little text to train on and hold out a part"
            )
        for suffix in (".npy", ".json"):
            (folder / f"train-00000{suffix}").rename(folder / f"train{suffix}")

    def load(folder: Path) -> tuple[TokenFile, TokenFile]:
        return TokenFile.open(folder / "train.npy"), TokenFile.open(folder / "validation.npy")

    key = hashlib.sha256(f"{_CACHE_FORMAT} {VALIDATION_FRACTION} {tokenizer.identity}".encode())
    for source in inputs:
        key.update(f"{source.reading}{' held out' * source.held_out} {source.content_hash()}".encode())
    return cached(f"{name}-{key.hexdigest()[:16]}", build, load, notify)


def _resolve(named: Sequence[Entry], given: _Given) -> DataSource:
    """The data of one or more entries as one source."""
    if len(named) > 1 and CLASSICS in [entry.path for entry in named]:
        raise UserError(f"{CLASSICS} and other data need weights: {CLASSICS}:0.5,PATH:0.5")
    paths = [existing(entry.path) for entry in named]
    name = CLASSICS if named[0].path == CLASSICS else paths[0].resolve().stem
    name += f"+{len(paths) - 1}" if len(paths) > 1 else ""
    tokens, texts = _files(paths, given)
    if tokens:
        return _token_source(name, tokens, given)
    own = given.tokenizer or builtin_tokenizer()
    if given.eos is not None:
        own = own.ending_with(given.eos, "--data.eos TOKEN")
    train, validation = _cached_tokens(name, texts, own, given.notify)
    if own.eos is None:  # tokenised by an earlier version
        notify = given.notify or logging.getLogger(__name__).info
        notify(f"{name}: its documents are joined without an end-of-text token, as an earlier version did")
    return DataSource(name, (MixturePart(name, (train,)),), validation, own, own.vocab_size, own.eos)


def _files(paths: Sequence[Path], given: _Given) -> tuple[list[Path], list[Input]]:
    """The token files or the texts of these paths; of a folder the token files, if it has any."""
    tokens: list[Path] = []
    names: list[str] = []
    for path in paths:
        if (path / PROGRESS_FILE).is_file():
            raise UserError(f"{path} is not complete: give the same sdd tokenize command again, it goes on")
        found = token_files(path, any_name=given.dtype is not None, notify=given.say)
        tokens += found
        if not found:
            names.append(str(path))
    texts = find_inputs(names, notify=given.say) if names else []
    if tokens and texts:
        raise UserError(
            f"{','.join(map(str, paths))} mixes token files ({tokens[0].name}) and text ({Path(texts[0].name).name}): "
            "give one or the other, or each a weight, PATH:WEIGHT"
        )
    return tokens, texts


def _mixed(named: Sequence[Entry], sources: Sequence[DataSource], context: int) -> DataSource:
    first = sources[0]
    for source in sources:
        tokenizers = {one.tokenizer.sha256 for one in (source, first) if one.tokenizer}
        if len(tokenizers) > 1 or _vocabulary(source) != _vocabulary(first):
            raise UserError(
                f"{source.name} ({_vocabulary(source)}) and {first.name} ({_vocabulary(first)}) were made with two "
                "tokenizers: sources of a mixture need one; for text, name it as data.tokenizer"
            )
    weights = [entry.share() for entry in named]
    parts = [replace(source.parts[0], weight=weight) for source, weight in zip(sources, weights, strict=True)]
    validation = mixed_validation([source.validation for source in sources], weights, context)
    name = ",".join(f"{source.name}:{entry.weight}" for source, entry in zip(sources, named, strict=True))
    tokenizer = next((source.tokenizer for source in sources if source.tokenizer), None)
    return DataSource(name, tuple(parts), validation, tokenizer, first.vocab_size, first.eos)


def _vocabulary(tokens: DataSource | TokenFile) -> str:
    return f"vocab_size {tokens.vocab_size}, eos {tokens.eos}"


def _token_source(name: str, paths: Sequence[Path], given: _Given) -> DataSource:
    if not any(path.stem in _VALIDATION_STEMS for path in paths):
        beside = (paths[-1].with_stem(stem) for stem in _VALIDATION_STEMS)
        paths = [*paths, *(path for path in beside if path.is_file())]
    files = [TokenFile.open(path, given.dtype) for path in paths]
    tokenizer = given.tokenizer or _tokenizer_of(files[0])
    files = [file.knowing(_eos_id(given.eos, files[0], tokenizer), None) for file in files]
    for file in files:
        _check_same_tokens(file, files[0], tokenizer)
    vocab_size = files[0].vocab_size or (tokenizer and tokenizer.vocab_size) or given.vocab_size
    if not vocab_size:
        raise UserError(
            f'{files[0].path}: the size of its vocabulary is unknown, put "vocab_size" into '
            f"{files[0].path.with_suffix('.json').name} or name the tokenizer"
        )
    eos = files[0].eos if files[0].eos is not None else tokenizer and tokenizer.eos
    files = [file.knowing(eos, vocab_size) for file in files]
    tokenizer = tokenizer and tokenizer.with_end(eos)
    validation = [file for file in files if file.path.stem in _VALIDATION_STEMS]
    train = [file for file in files if file not in validation]
    if not train or len(validation) > 1:
        raise UserError(f"{name}: expected token files to train on and at most one validation.npy")
    if not validation:
        last = train[-1]
        windows = max(1, int(last.n_windows(given.context) * _HELD_OUT_WINDOWS))
        cut = max(0, len(last) - windows * given.context - 1)
        train[-1], validation = last.slice(0, cut), [last.slice(cut, len(last))]
    return DataSource(name, (MixturePart(name, tuple(train)),), validation[0], tokenizer, vocab_size, eos)


def _eos_id(named: int | str | None, file: TokenFile, tokenizer: Tokenizer | None) -> int | None:
    if not isinstance(named, str):
        return named
    found = tokenizer and tokenizer.token_id(named)
    if found is None:
        why = f"{tokenizer.path} has no such token" if tokenizer else "the tokenizer is not known"
        raise UserError(f"{file.path}: the end-of-text token {named!r} was given, but {why}: give its id")
    return found


def _check_same_tokens(file: TokenFile, first: TokenFile, tokenizer: Tokenizer | None) -> None:
    made_with = file.info.tokenizer and file.info.tokenizer.sha256
    if tokenizer and made_with not in (None, tokenizer.sha256):
        raise UserError(
            f"{file.path} was made with tokenizer {made_with[:12]}, but {tokenizer.path} is {tokenizer.sha256[:12]}: "
            "name the one it was made with"
        )
    if _vocabulary(file) != _vocabulary(first):
        raise UserError(
            f"{file.path} ({_vocabulary(file)}) and {first.path} ({_vocabulary(first)}) differ: files of one run need "
            "one tokenizer"
        )


def _tokenizer_of(file: TokenFile) -> Tokenizer | None:
    """The tokenizer that a token file's json names, if it is at hand."""
    reference = file.info.tokenizer
    if reference is None:
        return None
    if reference.sha256 == builtin_tokenizer().sha256:
        return builtin_tokenizer()
    if reference.file and (path := file.path.parent / reference.file).is_file():
        return Tokenizer.load(path)
    return None
