"""What a folder holds that is data: which files are read, which are held out, and which are left out and why."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdd.data.kinds import kind_of, suffix_of
from sdd.data.shards import PROGRESS_FILE, SUMMARY_FILE
from sdd.files import is_stray

MANIFEST_FILE = "manifest.json"
_NAMED = 3  # files of a line
_ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|change(s|log)|history|contributing|authors|citation|code_of_conduct|security"
    r"|(dataset|data|model)_?card)([-_.].*)?",
    re.IGNORECASE,
)
_PARTS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_MARKS = (
    *("study.json", "config.json", "metrics.jsonl", "checkpoints", "environment.json", "state.json"),
    *(MANIFEST_FILE, SUMMARY_FILE, PROGRESS_FILE),
)
_WORDS = "|".join(_PARTS)
# train-00000-of-00002, validation_clean, webtext.valid, c4-validation.00000-of-00008
_PART_OF_NAME = re.compile(rf"({_WORDS})([-_.].*)?|.*[-_.]({_WORDS})([-_.]?\d+([-_.]of[-_.]\d+)?)?", re.DOTALL)


@dataclass
class Folder:
    """The files of a folder that is searched for data; all lists are in the order of their paths.

    Attributes:
        path: the folder.
        texts: files to tokenise.
        held_out: those among them that are for validation, by their names.
        tokens: token files, of this folder or, if there is no text, of folders that `sdd tokenize` wrote inside.
        left_out: the other files and folders, by the reason; without hidden ones and what systems leave.
    """

    path: Path
    texts: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    tokens: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, why: str, paths: Iterable[Path]) -> None:
        """Note what is left out."""
        if paths := list(paths):
            self.left_out.setdefault(why, []).extend(paths)

    def lines(self) -> list[str]:
        """What is held out and left out, in words."""
        found = {**self.left_out, "held out": self.held_out} if self.held_out else self.left_out
        return [f"{self.path}: {why}: {named(self._relative(paths))}" for why, paths in sorted(found.items())]

    def _relative(self, paths: Iterable[Path]) -> list[str]:
        return [str(path.relative_to(self.path)) for path in sorted(paths)]


def named(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    if len(names) <= _NAMED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED:,} more"


def search(path: Path) -> Folder:
    """Search a folder and all inside it, links followed, for data.

    Raises:
        OSError: the folder itself cannot be read.
    """
    found, tokens_inside = Folder(path), []
    for file in _files(found, tokens_inside):
        kind = kind_of(file)
        if kind is None:
            found.leave_out("left out, of no known kind", [file])
        elif kind == "tokens":
            if file.stat().st_size:
                found.tokens.append(file)
        elif suffix_of(file).startswith(".json") and not suffix_of(file).startswith(".jsonl"):
            found.leave_out("left out, to be named if it is JSON lines", [file])
        else:
            found.texts.append(file)
    _set_aside_what_is_about_data(found)
    _set_aside_parts(found)
    if not found.tokens and not found.texts:
        found.tokens = [file for folder in tokens_inside for file in search(folder).tokens]
    else:
        found.leave_out("left out, written by sdd", tokens_inside)
    for files in (found.texts, found.held_out, found.tokens):
        files.sort()
    return found


def what_we_wrote(folder: Path) -> str:
    """What a folder is, if `sdd` wrote it; else an empty string."""
    has = {name for name in _MARKS if (folder / name).exists()}
    if "study.json" in has:
        return "a study"
    if "config.json" in has and has & {"metrics.jsonl", "checkpoints", "environment.json"}:
        return "a run"
    if "state.json" in has and any(folder.glob("*.safetensors")):
        return "a checkpoint"
    return "token files" if MANIFEST_FILE in has and has & {SUMMARY_FILE, PROGRESS_FILE} else ""


def _files(found: Folder, tokens_inside: list[Path]) -> Iterator[Path]:
    """All files that may be data; links to folders are followed last, so that none takes the place of the folder."""
    pending, links = [found.path], []
    seen = {_identity(above) for above in found.path.resolve().parents}
    while pending or links:
        folder = pending.pop() if pending else links.pop(0)
        if (identity := _identity(folder)) in seen:
            continue
        seen.add(identity)
        try:
            inside = sorted(folder.iterdir())
        except OSError:
            if folder == found.path:
                raise
            found.leave_out("left out, cannot be read", [folder])
            continue
        for path in inside:
            if is_stray(path.name):
                continue
            if path.is_file():
                yield path
            elif not path.is_dir():
                found.leave_out("left out, neither a file nor a folder", [path])
            elif not (ours := what_we_wrote(path)):
                (links if path.is_symlink() else pending).append(path)
            elif ours == "token files":
                tokens_inside.append(path)
            else:
                found.leave_out("left out, written by sdd", [path])


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _set_aside_what_is_about_data(found: Folder) -> None:
    """Leave out a README and the like beside data of another kind."""
    about = {path for path in found.texts if _ABOUT_DATA.fullmatch(path.name[: -len(suffix_of(path))])}
    data = {suffix_of(path) for path in found.texts if path not in about}
    about = {path for path in about if data and suffix_of(path) not in data and kind_of(path) == "text"}
    found.leave_out("left out, about the data", about)
    found.texts = [path for path in found.texts if path not in about]


def _set_aside_parts(found: Folder) -> None:
    """Hold out the validation part, and leave out the test part, where there is one to train on."""
    parts = {path: part_of(path.relative_to(found.path)) for path in found.texts}
    held_out = [path for path, part in parts.items() if part == "validation"]
    if "train" in parts.values():
        test = {path for path, part in parts.items() if part == "test"}
        found.leave_out("left out, for tests", test)
        found.texts = [path for path in found.texts if path not in test]
    else:  # the short words may mean something else
        held_out = [path for path in held_out if re.match("validation", str(path.relative_to(found.path)), re.I)]
    found.held_out = held_out if len(held_out) < len(found.texts) else []


def part_of(path: Path) -> str:
    """The part of a data set that a file is by its name or that of a folder above it: train, validation, test or ""."""
    for name in path.parts[:-1]:
        if part := _PARTS.get(name.lower()):
            return part
    suffix = suffix_of(path)
    stem = path.name.lower().removesuffix(suffix)
    match = _PART_OF_NAME.fullmatch(stem)
    return _PARTS[match[1] or match[3]] if match else ""
