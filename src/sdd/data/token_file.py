"""Token files: the OLMo layout, a headerless array of token ids, and a small json that describes them.

`train.npy` holds the documents one after the other, an end-of-text token after each; `train.json` beside it holds a
`TokenInfo`. Files are read where they lie, so a corpus may be larger than memory.
"""

import hashlib
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pydantic

from sdd.errors import BadData, UserError
from sdd.files import aside, write_aside

FORMAT = 1
DtypeName = Literal["uint16", "uint32"]
_Model = TypeVar("_Model", bound=pydantic.BaseModel)
_FINGERPRINT_BLOCKS, _FINGERPRINT_TOKENS = 16, 4096
_CHECKED_BLOCKS, _CHECKED_TOKENS = 1024, 2**19


def smallest_dtype(vocab_size: int) -> DtypeName:
    """The smallest dtype that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def read_model(file: Path, model: type[_Model], advice: str) -> _Model:
    """The model that a JSON file holds.

    Raises:
        UserError: something else; the message names the first problem and ends with `advice`.
    """
    try:
        return model.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {error.filename or file}: {error.strerror}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        problem = " ".join(f"{where}: {first['msg']}".split())[:300]
        raise UserError(f"{file}: {problem}; {advice}") from None


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

    `n_bytes` counts the UTF-8 bytes of the text without end-of-text tokens. In every field None means unknown.
    """

    format: int = FORMAT
    dtype: DtypeName
    n_tokens: int | None = pydantic.Field(default=None, ge=0)
    n_bytes: int | None = pydantic.Field(default=None, ge=0)
    n_documents: int | None = pydantic.Field(default=None, ge=0)
    eos: int | None = pydantic.Field(default=None, ge=0, lt=2**32)
    vocab_size: int | None = pydantic.Field(default=None, ge=0, le=2**32)
    tokenizer: TokenizerRef | None = None


class OpenTokens:
    """Token ids in an open file; a file that is cut off or deleted meanwhile does no harm.

    A memory map of a file that has become shorter kills the process (SIGBUS); a read returns less than was asked for.
    So batches are read, and only code that wants the whole array at once gets a map. A deleted file stays readable
    until it is closed.

    Args:
        path: the file.
        dtype: of a token on disk.
        offset: bytes before the first token.
        n_tokens: how many there are.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path, dtype: np.dtype, offset: int, n_tokens: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._path, self._dtype, self._offset, self._n_tokens = path, dtype, offset, n_tokens
        self._map: np.ndarray | None = None

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """A copy of some consecutive tokens.

        Raises:
            BadData: the file is no longer as long as it was when it was opened, or cannot be read any more.
        """
        start, stop, _ = wanted.indices(self._n_tokens)
        if not hasattr(os, "pread"):  # Windows, which does not let a mapped file be cut off
            return self.mapped()[start:stop]
        place, missing = self._offset + start * self._dtype.itemsize, (stop - start) * self._dtype.itemsize
        blocks: list[bytes] = []
        while missing > 0:
            try:
                block = os.pread(self._descriptor, missing, place)
            except OSError as error:
                raise BadData(f"cannot read {self._path} any more: {error.strerror}") from None
            if not block:
                raise self._cut_off()
            blocks.append(block)
            place, missing = place + len(block), missing - len(block)
        return np.frombuffer(blocks[0] if len(blocks) == 1 else b"".join(blocks), self._dtype)

    def mapped(self) -> np.ndarray:
        """All tokens as one memory-mapped, read-only array; do not use it where the file may be cut off meanwhile.

        Raises:
            BadData: the file is no longer as long as it was when it was opened.
        """
        if os.fstat(self._descriptor).st_size < self._size:
            raise self._cut_off()
        if self._map is None:
            whole = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
            self._map = np.frombuffer(whole, self._dtype, self._n_tokens, self._offset)
        return self._map

    @property
    def _size(self) -> int:
        return self._offset + self._n_tokens * self._dtype.itemsize

    def _cut_off(self) -> BadData:
        return BadData(
            f"{self._path} was cut off while in use: it had {self._size:,} bytes, now it has "
            f"{os.fstat(self._descriptor).st_size:,}; bring the whole file back and go on from the last checkpoint"
        )


class TokenFile:
    """Token ids on disk: a whole file or a part of one.

    Args:
        path: the file.
        tokens: its ids, in memory or on disk.
        info: the json beside it, checked against the file; of a part, only the facts that still hold.
        part: which of the tokens, all by default.
    """

    def __init__(self, path: Path, tokens: np.ndarray | OpenTokens, info: TokenInfo, part: range | None = None) -> None:
        self.path, self.info = path, info
        self._tokens = tokens
        self._part = range(len(tokens)) if part is None else part

    @classmethod
    def open(
        cls, path: str | Path, dtype: str | None = None, eos: int | None = None, vocab_size: int | None = None
    ) -> "TokenFile":
        """Open a token file; nothing but its header is read.

        A real `.npy` with a header is read as well. `dtype`, `eos` and `vocab_size` are needed where the json does not
        have them.

        Raises:
            UserError: no such file, no way to know the dtype, or a file that contradicts its json.
        """
        path = Path(path)
        try:
            if not path.is_file():
                raise UserError(f"no token file {path}")
            return cls._open(path, dtype).knowing(eos, vocab_size)
        except OSError as error:
            raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None

    @classmethod
    def _open(cls, path: Path, dtype: str | None) -> "TokenFile":
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
        info = _completed(path, info or TokenInfo(dtype=dtype), n_tokens=n_tokens)
        return cls(path, OpenTokens(path, array_dtype, offset, n_tokens), info)

    @property
    def tokens(self) -> np.ndarray:
        """All ids, a read-only array [n_tokens] of unsigned integers, memory-mapped where they are on disk."""
        whole = self._tokens if isinstance(self._tokens, np.ndarray) else self._tokens.mapped()
        return whole[self._part.start : self._part.stop]

    def __len__(self) -> int:
        return len(self._part)

    def knowing(self, eos: int | None, vocab_size: int | None) -> "TokenFile":
        """The same file, with facts that its json lacks.

        Raises:
            UserError: the json says something else.
        """
        info = _completed(self.path, self.info, eos=eos, vocab_size=vocab_size)
        return TokenFile(self.path, self._tokens, info, self._part)

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
        part = self._part[start:stop]
        info = self.info.model_copy(update={"n_tokens": len(part), "n_bytes": None, "n_documents": None})
        return TokenFile(self.path, self._tokens, info, part)

    def read(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for every start.

        Returns:
            int64 [len(starts), length].

        Raises:
            BadData: an id that the vocabulary does not have, or the file has been cut off since it was opened.
        """
        out = np.empty((len(starts), length), np.int64)
        for row, start in zip(out, starts, strict=True):
            row[:] = self._block(int(start), int(start) + length)
            if (bad := self._bad_id(row, int(start))) is not None:
                raise BadData(bad)
        return out

    def check_ids(self) -> None:
        """Look for ids that the vocabulary does not have: at all tokens of up to 2**29, of more at as many of them.

        Raises:
            UserError: there is one.
        """
        if self.vocab_size is None or self.vocab_size > np.iinfo(self.info.dtype).max:
            return
        starts = np.arange(0, len(self), _CHECKED_TOKENS)
        if len(starts) > _CHECKED_BLOCKS:
            starts = np.linspace(0, len(self) - _CHECKED_TOKENS, _CHECKED_BLOCKS, dtype=np.int64)
        for start in starts.tolist():
            if (bad := self._bad_id(self._block(start, start + _CHECKED_TOKENS), start)) is not None:
                raise UserError(bad)

    def _bad_id(self, tokens: np.ndarray, start: int) -> str | None:
        """What is wrong with consecutive tokens, the first of which is token `start` of this part."""
        if self.vocab_size is None or not tokens.size or int(tokens.max()) < self.vocab_size:
            return None
        place = int(np.argmax(tokens >= self.vocab_size))
        where = f"position {self._part.start + start + place:,}, counted from 0"
        return (
            f"{self.path} holds token id {tokens[place]}, but its vocabulary has {self.vocab_size} tokens: "
            f"wrong dtype, wrong vocab_size, or a damaged file ({where})"
        )

    def fingerprint(self) -> str:
        """Hash of the number of tokens and of 16 blocks spread over them: cheap, and any ordinary change alters it."""
        n_tokens = len(self)
        digest = hashlib.sha256(str(n_tokens).encode())
        last = max(0, n_tokens - _FINGERPRINT_TOKENS)
        for start in np.linspace(0, last, _FINGERPRINT_BLOCKS, dtype=np.int64).tolist():
            digest.update(self._block(start, start + _FINGERPRINT_TOKENS).astype("<u4").tobytes())
        return digest.hexdigest()

    def _block(self, start: int, stop: int) -> np.ndarray:
        part = self._part[start:stop]
        return self._tokens[part.start : part.stop]


def write_tokens(path: str | Path, blocks: Iterable[Sequence[int] | np.ndarray], info: TokenInfo) -> TokenFile:
    """Write a token file block by block; it appears when it is complete, and its json after it.

    Args:
        path: the file; an older one is replaced.
        blocks: token ids, end-of-text tokens included.
        info: the content of the json, except for the number of tokens.

    Raises:
        UserError: no tokens at all, or an id that does not fit the vocabulary or the dtype.
    """
    path, n_tokens = Path(path), 0
    dtype = np.dtype(info.dtype).newbyteorder("<")
    limit = min(info.vocab_size or 2**32, 2 ** (8 * dtype.itemsize))
    with aside(path) as temporary:
        with temporary.open("wb") as file:
            for block in blocks:
                array = np.asarray(block, np.int64)
                if array.size and not 0 <= (worst := int(array.view(np.uint64).max())) < limit:
                    raise UserError(f"{path}: token id {worst} is outside the vocabulary of {limit} tokens")
                file.write(array.astype(dtype).data)
                n_tokens += array.size
        if not n_tokens:
            raise UserError(f"{path}: no tokens to write")
        path.with_suffix(".json").unlink(missing_ok=True)  # an old json beside the new tokens would be a lie
    info = info.model_copy(update={"n_tokens": n_tokens})
    write_aside(path.with_suffix(".json"), info.model_dump_json(indent=2) + "\n", durable=False)
    return TokenFile.open(path)


def check_length(name: str, files: Iterable[TokenFile], context: int) -> None:
    """Raise UserError unless one of the files has a window of `context` + 1 tokens; `name` says what they are."""
    longest = max((len(file) for file in files), default=0)
    if longest <= context:
        raise UserError(
            f"{name}: too little data, a context of {context} needs {context + 1} tokens in a file, the longest has "
            f"{longest}; bring more text or shorten the context"
        )


def _read_info(path: Path) -> TokenInfo | None:
    json_path = path.with_suffix(".json")
    if not json_path.is_file():
        return None
    info = read_model(json_path, TokenInfo, 'expected e.g. {"dtype": "uint16"}')
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
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy evaluates the header as a Python literal, which fails in a dozen ways
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} has a damaged .npy header: {why}") from None
    size = path.stat().st_size
    if array.ndim != 1 or not array.size or size != array.offset + array.nbytes:
        raise UserError(f"{path}: its .npy header says shape {array.shape} of {array.dtype}, and it has {size} bytes")
    return array.offset, array.dtype, len(array)
