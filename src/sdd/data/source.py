"""From what the user names (`--data`) to token files."""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdd.data.cache import Notify
from sdd.data.corpora import builtin_tokenizer, classics
from sdd.data.prepare import cached_token_files
from sdd.data.text import TEXT_SUFFIXES
from sdd.data.token_file import TokenFile
from sdd.data.tokenizer import Tokenizer
from sdd.errors import UserError

TOKEN_SUFFIXES = (".npy", ".bin")
HELD_OUT_WINDOWS = 0.01


@dataclass(frozen=True, eq=False)
class DataSource:
    """Tokens to train on and to validate with, and what they mean.

    `tokenizer` is None where only tokens are known; `eos` where the vocabulary has no end-of-text token.
    """

    name: str
    train: list[TokenFile]
    validation: TokenFile
    tokenizer: Tokenizer | None
    vocab_size: int
    eos: int | None

    @property
    def n_tokens(self) -> int:
        """Training tokens."""
        return sum(len(file) for file in self.train)

    def fingerprint(self) -> str:
        """A cheap hash of the tokens, by which a resumed run knows that its data are still the same."""
        parts = [file.fingerprint() for file in (*self.train, self.validation)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def resolve_data(
    spec: str | Path | None = None,
    tokenizer: str | Path | None = None,
    *,
    context: int,
    dtype: str | None = None,
    notify: Notify | None = None,
) -> DataSource:
    """Find, and if need be tokenise, the data that `spec` names.

    Args:
        spec: None or "classics" for the built-in corpus; or one path, or several separated by commas, of
            - token files (.npy, .bin), or a directory of them: `validation.npy`, among them or beside them, is the
              validation part, all others are trained on; without it the last 1% of the last file's windows (at
              least one) is held out;
            - text files (any UTF-8 file; .jsonl, .jsonl.zst and .jsonl.gz hold one document a line under "text"), or a
              directory of them: tokenised into the cache, about 5% held out (see `sdd.data.text.TailSplit`).
        tokenizer: path of a tokenizer.json; by default the token files' own, or the built-in one for text.
        context: tokens of input in a sample; both parts must have room for one.
        dtype: of token files without a json.
        notify: receives one line before work that takes a while; by default it is logged.

    Raises:
        UserError: nothing there, not readable as what it is, or too little of it.
    """
    own = Tokenizer.load(tokenizer) if tokenizer else None
    if spec in (None, "classics"):
        train, validation = classics(own, notify)
        return _checked(_text_source("classics", train, validation, own or builtin_tokenizer()), context)
    paths = _paths(str(spec))
    name = paths[0].resolve().stem + (f"+{len(paths) - 1}" if len(paths) > 1 else "")
    files = _expanded(paths)
    tokens = [file for file in files if file.suffix in TOKEN_SUFFIXES]
    if tokens and len(tokens) < len(files):
        (text, *_) = set(files) - set(tokens)
        raise UserError(f"{spec} mixes token files ({tokens[0].name}) and text ({text.name}): give one or the other")
    if tokens:
        return _checked(_token_source(name, tokens, own, context, dtype), context)
    own = own or builtin_tokenizer()
    return _checked(_text_source(name, *cached_token_files(name, files, own, notify), own), context)


def _paths(spec: str) -> list[Path]:
    whole = Path(spec).expanduser()
    if whole.exists() or "," not in spec:
        return [_existing(whole)]
    return [_existing(Path(part.strip()).expanduser()) for part in spec.split(",") if part.strip()]


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*there, "classics"], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "expected classics, token files (.npy) or text files"
    raise UserError(f"no data at {path}: {hint}")


def _expanded(paths: Sequence[Path]) -> list[Path]:
    """The files that are named or lie in a directory that is named; of a directory the token files, if it has any."""
    files: list[Path] = []
    for path in paths:
        if path.is_file():
            if not path.stat().st_size:
                raise UserError(f"{path} is empty")
            files.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
        found = [file for file in inside if file.suffix in TOKEN_SUFFIXES]
        found = found or [file for file in inside if file.name.endswith(TEXT_SUFFIXES)]
        if not found:
            raise UserError(f"{path} holds neither token files (.npy, .bin) nor text ({', '.join(TEXT_SUFFIXES)})")
        files += found
    return files


def _text_source(name: str, train: TokenFile, validation: TokenFile, tokenizer: Tokenizer) -> DataSource:
    return DataSource(name, [train], validation, tokenizer, tokenizer.vocab_size, tokenizer.eos)


def _token_source(
    name: str, paths: Sequence[Path], tokenizer: Tokenizer | None, context: int, dtype: str | None
) -> DataSource:
    beside = paths[-1].with_stem("validation")
    if beside.is_file() and beside not in paths:
        paths = [*paths, beside]
    files = [TokenFile.open(path, dtype) for path in paths]
    tokenizer = tokenizer or _tokenizer_of(files[0])
    for file in files:
        _check_same_tokens(file, files[0], tokenizer)
    vocab_size = files[0].vocab_size or (tokenizer and tokenizer.vocab_size)
    if not vocab_size:
        raise UserError(
            f'{files[0].path}: the size of its vocabulary is unknown, put "vocab_size" into '
            f"{files[0].path.with_suffix('.json').name} or name the tokenizer"
        )
    eos = files[0].eos if files[0].eos is not None else tokenizer and tokenizer.eos
    files = [TokenFile.open(path, dtype, eos, vocab_size) for path in paths]
    validation = [file for file in files if file.path.stem == "validation"]
    train = [file for file in files if file.path.stem != "validation"]
    if not train or len(validation) > 1:
        raise UserError(f"{name}: expected token files to train on and at most one validation.npy")
    if not validation:
        train[-1], held_out = _hold_out(train[-1], context)
        validation = [held_out]
    return DataSource(name, train, validation[0], tokenizer, vocab_size, eos)


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


def _check_same_tokens(file: TokenFile, first: TokenFile, tokenizer: Tokenizer | None) -> None:
    made_with = file.info.tokenizer and file.info.tokenizer.sha256
    if tokenizer and made_with and made_with != tokenizer.sha256:
        raise UserError(
            f"{file.path} was made with tokenizer {made_with[:12]}, but {tokenizer.path} is {tokenizer.sha256[:12]}: "
            "name the one it was made with"
        )
    if file.vocab_size != first.vocab_size or file.eos != first.eos:
        raise UserError(
            f"{file.path} (vocab_size {file.vocab_size}, eos {file.eos}) and {first.path} (vocab_size "
            f"{first.vocab_size}, eos {first.eos}) differ: files of one run need one tokenizer"
        )


def _hold_out(file: TokenFile, context: int) -> tuple[TokenFile, TokenFile]:
    held_out = max(1, int(file.n_windows(context) * HELD_OUT_WINDOWS)) * context + 1
    cut = max(0, len(file) - held_out)
    return file.slice(0, cut), file.slice(cut, len(file))


def _checked(source: DataSource, context: int) -> DataSource:
    train = max(source.train, key=len)
    for part, file in (("training", train), ("validation", source.validation)):
        if not file.n_windows(context):
            raise UserError(
                f"{source.name}: too little data, the {part} part has {len(file)} tokens in one file and a context of "
                f"{context} needs {context + 1}; bring more text or shorten the context"
            )
    return source
