"""Token files: the OLMo layout, a headerless array of token ids, and a small json that says what they are.

`train.npy` holds the documents one after the other, an end-of-text token after each; `train.json` beside it holds a
`TokenInfo`. Files are read where they lie, so a corpus may be larger than memory.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import pydantic

from sdd.data.stored import StoredTokens
from sdd.errors import UserError

FORMAT = 1
DtypeName = Literal["uint16", "uint32"]
_FINGERPRINT_BLOCKS, _FINGERPRINT_TOKENS = 16, 4096


class TokenizerRef(pydantic.BaseModel, frozen=True):
    """Which tokenizer made a token file: the hash of its `tokenizer.json`, and that file's name if it lies beside."""

    sha256: str
    file: str | None = None

    @pydantic.field_validator("file")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        # The json may come from anywhere: it must not lead out of its folder, nor to what the system cannot look up.
        if name is not None and (Path(name).name != name or not name.isprintable() or len(name.encode()) > 255):
            raise ValueError("not the name of a file beside it")
        return name


class TokenInfo(pydantic.BaseModel, frozen=True):
    """The json beside a token file; only `dtype` is needed to read one.

    `n_bytes` counts the UTF-8 bytes of the text, end-of-text tokens excluded; None means unknown, in all fields.
    """

    format: int = FORMAT
    dtype: DtypeName
    n_tokens: int | None = pydantic.Field(default=None, ge=0)
    n_bytes: int | None = pydantic.Field(default=None, ge=0)
    n_documents: int | None = pydantic.Field(default=None, ge=0)
    eos: int | None = pydantic.Field(default=None, ge=0, lt=2**32)
    vocab_size: int | None = pydantic.Field(default=None, ge=0, le=2**32)
    tokenizer: TokenizerRef | None = None


class TokenFile:
    """Token ids on disk: a whole file or a part of one.

    Args:
        path: the file.
        tokens: its ids, in memory or on disk.
        info: what the json beside it says, checked against the file; of a part, what still holds.
    """

    def __init__(self, path: Path, tokens: np.ndarray | StoredTokens, info: TokenInfo) -> None:
        self.path, self.info = path, info
        self._tokens = tokens

    @classmethod
    def open(
        cls, path: str | Path, dtype: str | None = None, eos: int | None = None, vocab_size: int | None = None
    ) -> "TokenFile":
        """Open a token file; nothing but its header is read.

        A real `.npy` with a header is read as well. `dtype`, `eos` and `vocab_size` stand in for what the json does
        not say.

        Raises:
            UserError: no such file, no way to know the dtype, or a file that contradicts its json.
        """
        path = Path(path)
        try:
            if not path.is_file():
                raise UserError(f"no token file {path}")
            return cls._open(path, dtype, eos, vocab_size)
        except OSError as error:
            raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None

    @classmethod
    def _open(cls, path: Path, dtype: str | None, eos: int | None, vocab_size: int | None) -> "TokenFile":
        info = _read_info(path)
        header = _npy_header(path)
        known = {
            "the json": info and info.dtype,
            "the caller": dtype,
            "the file's header": header and header[1].name,
        }
        dtype = _agreed_dtype(path, {who: name for who, name in known.items() if name})
        offset, array_dtype, n_tokens = header or _headerless(path, np.dtype(dtype))
        if info and info.n_tokens not in (None, n_tokens):
            raise UserError(
                f"{path} holds {n_tokens} {dtype} tokens, but {path.with_suffix('.json').name} says {info.n_tokens}: "
                "the file is incomplete or the json belongs to another; write both again"
            )
        info = info or TokenInfo.model_validate({"dtype": dtype})
        file = cls(path, StoredTokens(path, array_dtype, offset, n_tokens), _completed(path, info, n_tokens=n_tokens))
        return file.knowing(eos, vocab_size)

    @property
    def tokens(self) -> np.ndarray:
        """All ids, a read-only array [n_tokens] of unsigned integers, memory-mapped where they are on disk."""
        return self._tokens if isinstance(self._tokens, np.ndarray) else self._tokens.mapped()

    def __len__(self) -> int:
        return len(self._tokens)

    def knowing(self, eos: int | None, vocab_size: int | None) -> "TokenFile":
        """The same file with what its json does not say.

        Raises:
            UserError: the json says something else.
        """
        return TokenFile(self.path, self._tokens, _completed(self.path, self.info, eos=eos, vocab_size=vocab_size))

    @property
    def eos(self) -> int | None:
        """Id of the end-of-text token."""
        return self.info.eos

    @property
    def vocab_size(self) -> int | None:
        """Every id is below this number."""
        return self.info.vocab_size

    def n_windows(self, context: int) -> int:
        """Number of windows of context + 1 tokens at stride `context`: each token but the first a target once."""
        return max(0, (len(self) - 1) // context)

    def slice(self, start: int, stop: int) -> "TokenFile":
        """The part [start, stop) as a token file of its own, on the same memory."""
        stored = self._tokens
        tokens = stored[start:stop] if isinstance(stored, np.ndarray) else stored.part(start, stop)
        info = self.info.model_copy(update={"n_tokens": len(tokens), "n_bytes": None, "n_documents": None})
        return TokenFile(self.path, tokens, info)

    def read(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for every start.

        Returns:
            int64 [len(starts), length].

        Raises:
            UserError: an id that the vocabulary does not have.
            RunFailed: the file has been cut off since it was opened.
        """
        out = np.empty((len(starts), length), np.int64)
        for row, start in zip(out, starts, strict=True):
            row[:] = self._block(int(start), int(start) + length)
        if self.vocab_size is not None and out.size and (worst := int(out.max())) >= self.vocab_size:
            raise UserError(
                f"{self.path} holds token id {worst}, but its vocabulary has {self.vocab_size} tokens: "
                "wrong dtype, wrong vocab_size, or a damaged file"
            )
        return out

    def fingerprint(self) -> str:
        """Hash of the number of tokens and of 16 blocks spread over them: cheap, and new for any ordinary change."""
        n_tokens = len(self)
        digest = hashlib.sha256(str(n_tokens).encode())
        last = max(0, n_tokens - _FINGERPRINT_TOKENS)
        for start in np.linspace(0, last, _FINGERPRINT_BLOCKS, dtype=np.int64).tolist():
            digest.update(self._block(start, start + _FINGERPRINT_TOKENS).astype("<u4").tobytes())
        return digest.hexdigest()

    def _block(self, start: int, stop: int) -> np.ndarray:
        stored = self._tokens
        return stored[start:stop] if isinstance(stored, np.ndarray) else stored.read(start, stop)


class TokenWriter:
    """Write a token file piece by piece; it appears, complete, when the `with` block ends without error.

    The dtype is the smallest that holds the vocabulary. Until the end the tokens stand in a hidden file beside it; the
    json is written last, so a file with a json is whole. No file is left of no tokens at all.
    """

    def __init__(self, path: str | Path, vocab_size: int, eos: int | None, tokenizer: TokenizerRef | None = None):
        self.path = Path(path)
        self.eos = eos
        self.vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._tokenizer = tokenizer
        self.n_tokens = self.n_documents = 0
        self._n_bytes: int | None = 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")

    def __enter__(self) -> "TokenWriter":
        self._file = self._partial.open("wb")
        return self

    def write(self, ids: Sequence[int] | np.ndarray, n_bytes: int | None = None) -> None:
        """Append tokens that stand for `n_bytes` of UTF-8; the file's count is unknown if one piece's is.

        Raises:
            UserError: an id outside the vocabulary.
        """
        array = np.asarray(ids, np.int64)
        if array.size and not 0 <= (worst := int(array.view(np.uint64).max())) < self.vocab_size:
            raise UserError(f"{self.path}: token id {worst} is outside the vocabulary of {self.vocab_size} tokens")
        self._file.write(array.astype(self._dtype).data)
        self.n_tokens += array.size
        self._n_bytes = None if n_bytes is None or self._n_bytes is None else self._n_bytes + n_bytes

    def end_document(self) -> None:
        """Close the document: append the end-of-text token, if the vocabulary has one."""
        self.n_documents += 1
        if self.eos is not None:
            self.write([self.eos], n_bytes=0)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()
        if kind is not None or not self.n_tokens:
            self._partial.unlink(missing_ok=True)
            return
        json_path = self.path.with_suffix(".json")
        json_path.unlink(missing_ok=True)  # an old json beside the new tokens would be a lie
        self._partial.replace(self.path)
        partial_json = json_path.with_name(f".{json_path.name}.{os.getpid()}")
        partial_json.write_text(self.info().model_dump_json(indent=2) + "\n")
        partial_json.replace(json_path)

    def info(self) -> TokenInfo:
        """What has been written so far."""
        return TokenInfo(
            dtype="uint16" if self._dtype.itemsize == 2 else "uint32",
            n_tokens=self.n_tokens,
            n_bytes=self._n_bytes,
            n_documents=self.n_documents,
            eos=self.eos,
            vocab_size=self.vocab_size,
            tokenizer=self._tokenizer,
        )


def _read_info(path: Path) -> TokenInfo | None:
    json_path = path.with_suffix(".json")
    if not json_path.is_file():
        return None
    try:
        info = TokenInfo.model_validate_json(json_path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = " ".join(first["msg"].split())
        raise UserError(f'{json_path}: {where}: {message}; expected e.g. {{"dtype": "uint16"}}') from None
    if info.format > FORMAT:
        raise UserError(f"{json_path} has format {info.format}, this version reads up to {FORMAT}: update sdd")
    return info


def _completed(path: Path, info: TokenInfo, **given: int | None) -> TokenInfo:
    for name, value in given.items():
        stated = getattr(info, name)
        if value is not None and stated not in (None, value):
            raise UserError(f"{path}: {name} {value} was given, but {path.with_suffix('.json').name} says {stated}")
    info = info.model_copy(update={name: value for name, value in given.items() if value is not None})
    if info.eos is not None and info.vocab_size is not None and info.eos >= info.vocab_size:
        raise UserError(f"{path}: eos {info.eos} is outside its vocabulary of {info.vocab_size} tokens")
    return info


def _agreed_dtype(path: Path, known: dict[str, str]) -> DtypeName:
    names = set(known.values())
    if not names:
        raise UserError(
            f"{path} has no {path.with_suffix('.json').name} beside it that names its dtype: "
            'write one, e.g. {"dtype": "uint16", "vocab_size": 50280, "eos": 0}, or pass dtype'
        )
    if len(names) > 1:
        raise UserError(f"{path}: " + ", ".join(f"{who} says {name}" for who, name in known.items()) + ": which is it?")
    (name,) = names
    if name not in ("uint16", "uint32"):
        raise UserError(f"{path} has dtype {name}: expected uint16 or uint32")
    return name


def _headerless(path: Path, dtype: np.dtype) -> tuple[int, np.dtype, int]:
    size = path.stat().st_size
    n_tokens, rest = divmod(size, dtype.itemsize)
    if rest:
        raise UserError(f"{path} has {size} bytes, no multiple of the {dtype.itemsize} of {dtype.name}: cut off?")
    if not n_tokens:
        raise UserError(f"{path} is empty")
    return 0, dtype.newbyteorder("<"), n_tokens


def _npy_header(path: Path) -> tuple[int, np.dtype, int] | None:
    """Offset, dtype and length of the array in a real .npy file; None for a headerless one."""
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return None
        file.seek(0)
        try:
            reads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = reads[np.lib.format.read_magic(file)](file)
        except Exception as error:  # numpy evaluates the header as a Python literal, which fails in a dozen ways
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{path} has a damaged .npy header: {why}") from None
        offset = file.tell()
    size = path.stat().st_size
    if len(shape) != 1 or not shape[0] or size != offset + shape[0] * dtype.itemsize:
        raise UserError(f"{path}: its .npy header says shape {shape} of {dtype}, which {size} bytes do not hold")
    return offset, dtype, shape[0]
