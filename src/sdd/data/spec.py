"""Parse the value of `--data`: paths, with a weight each if it is a mixture."""

import difflib
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pydantic

from sdd.data.token_file import read_model
from sdd.errors import UserError

CLASSICS = "classics"
HUB = "hf:"
_CORPUS = Path(__file__).parent / "assets" / "classics.jsonl.zst"
_MIXTURE_FILE = "mixture.json"
_LARGEST_MIXTURE_FILE = 1 << 20
_SIMILAR = 0.75
_WEIGHTED = re.compile(r"(.+):([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """A path or "classics", and the weight as it was written, if there is one."""

    path: str
    weight: str | None = None

    def share(self) -> Fraction:
        """The weight as an exact number; 1 if none was given.

        Raises:
            UserError: a weight that is not positive, or out of all proportion.
        """
        weight = Fraction(self.weight or "1")
        if not 0 < weight < 10**12:
            raise UserError(f"{self.path}: the weight {self.weight} must be above 0 and below 1e12")
        return weight


def entries(spec: str) -> list[Entry]:
    """The entries that `spec` names: one path, several separated by commas, PATH:WEIGHT, or a mixture file.

    Raises:
        UserError: nothing there, or weights for some entries and none for others.
    """
    found = _split(spec)
    if len(found) == 1 and found[0].weight is None and (file := _mixture_file(found[0].path)):
        found = _read_mixture(file)
    for entry in found:
        if _mixture_file(entry.path):
            raise UserError(f"{entry.path} is a mixture itself: name its sources instead")
    unweighted = [entry.path for entry in found if entry.weight is None]
    if unweighted and len(unweighted) < len(found):
        raise UserError(f"{unweighted[0]} has no weight but others have one: give PATH:WEIGHT for all or for none")
    return found


def absolute(spec: str) -> str:
    """The same spec with absolute paths, so that it means the same from any folder."""
    return ",".join(
        (entry.path if entry.path == CLASSICS else str(Path(entry.path).expanduser().absolute()))
        + (f":{entry.weight}" if entry.weight else "")
        for entry in _split(spec)
    )


def existing(name: str, expected: str = "classics, token files (.npy) or text files") -> Path:
    """The path of that name, or of the built-in corpus.

    Args:
        name: a path or "classics".
        expected: stands in the message if nothing has a similar name.

    Raises:
        UserError: there is none; the message has the nearest names that there are.
    """
    path = _CORPUS if name == CLASSICS else Path(name).expanduser()
    if _exists(path):
        return path
    head, _, weight = name.rpartition(":")
    if head and (head == CLASSICS or _exists(Path(head).expanduser())):
        raise UserError(f"the weight {weight!r} of {_printable(Path(head))} is no number: expected e.g. {head}:0.5")
    close = _similar(path)
    hint = f"did you mean {' or '.join(close)}?" if close else f"expected {expected}"
    if HUB in name:
        hint = f"a dataset has to become token files first: sdd tokenize {name} --out DIR"
    raise UserError(f"no data at {_printable(path)}: {hint}")


def _similar(path: Path) -> list[str]:
    """Names in the same folder that are nearly the same, whatever their kinds."""
    there = [p.name for p in path.parent.iterdir()] if _exists(path.parent) and path.parent.is_dir() else []
    stems: dict[str, list[str]] = {}
    for name in [*there, CLASSICS]:
        stems.setdefault(name.partition(".")[0], []).append(name)
    close = difflib.get_close_matches(path.name.partition(".")[0], [stem for stem in stems if stem], 3, _SIMILAR)
    return sorted((name for stem in close for name in stems[stem]), key=lambda name: -_ratio(name, path.name))[:3]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def is_mixture(path: Path) -> bool:
    """Whether a .json is a mixture's; others are read as JSON lines."""
    if path.suffix != ".json" or path.stat().st_size > _LARGEST_MIXTURE_FILE:
        return False
    return re.match(rb'\s*\{\s*"sources"\s*:', path.read_bytes()) is not None


def _split(spec: str) -> list[Entry]:
    if spec == CLASSICS or _exists(Path(spec).expanduser()):
        return [Entry(spec)]
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    return [_entry(part) for part in parts] or [Entry(spec)]


def _entry(text: str) -> Entry:
    weighted = _WEIGHTED.fullmatch(text)
    if weighted is None or _exists(Path(text).expanduser()):
        return Entry(text)
    return Entry(*weighted.groups())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long or holds a NUL
        return False


def _printable(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() and len(text) < 1000 else repr(text[:1000])


def _mixture_file(name: str) -> Path | None:
    path = existing(name)
    if path.is_dir():
        path = path / _MIXTURE_FILE
    return path if path.is_file() and (path.name == _MIXTURE_FILE or is_mixture(path)) else None


class _Source(pydantic.BaseModel, extra="forbid"):
    path: str
    weight: float = pydantic.Field(gt=0, allow_inf_nan=False)


class _Mixture(pydantic.BaseModel, extra="forbid"):
    sources: list[_Source] = pydantic.Field(min_length=1)


def _read_mixture(file: Path) -> list[Entry]:
    mixture = read_model(file, _Mixture, 'expected e.g. {"sources": [{"path": "a.npy", "weight": 0.7}, ...]}')
    folder = file.absolute().parent
    return [
        Entry(s.path if s.path == CLASSICS else str(folder / Path(s.path).expanduser()), repr(s.weight))
        for s in mixture.sources
    ]
