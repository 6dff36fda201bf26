"""Going on with a folder of tokens that was begun: with the same inputs and settings, or with inputs mended since.

What is done is never read again, so inputs that have been read must be as they were. Of the one that is being read, the
records up to there must be; what comes after may have been mended or taken away.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdd.data.chunks import Manifest
from sdd.data.inputs import Input, records
from sdd.data.shards import Position
from sdd.data.text import Cut
from sdd.errors import UserError


def going_on(
    out: Path, before: Manifest, now: Manifest, position: Position | None, names: Sequence[str], cut: Cut | None = None
) -> Manifest:
    """The manifest under which work in `out` goes on.

    Args:
        out: the folder, for messages.
        before: the manifest that it was begun with.
        now: that of this call.
        position: how far the work has come; None if it is complete.
        names: the files and folders that this call was given.
        cut: says where long texts are cut.

    Raises:
        UserError: what has been done would not fit; the message says what differs.
    """
    advice = f"give the same inputs and settings again, or another folder than {out}"
    for name in Manifest.model_fields:
        had, has = getattr(before, name), getattr(now, name)
        if name not in ("inputs", "skip_bad") and had != has:
            raise UserError(f"{out} was begun with {name.replace('_', ' ')} {had}, now it is {has}: {advice}")
    if before.skip_bad and not now.skip_bad:
        raise UserError(f"{out} was begun with --skip-bad: {advice}")
    inputs = _with_those_left_out_today(before.inputs, now.inputs, names)
    first_open = len(before.inputs) if position is None else position.input
    if new := next((source.name for source in inputs if source.name not in {old.name for old in before.inputs}), ""):
        raise UserError(f"{out} was begun with other inputs ({new} is new): {advice}")
    found = {source.name: source for source in inputs}
    if [source.name for source in inputs] != [source.name for source in before.inputs if source.name in found]:
        raise UserError(f"{out} was begun with other inputs (another order): {advice}")
    kept: list[Input] = []
    for number, old in enumerate(before.inputs):
        new = found.get(old.name)
        if number < first_open and old.taken is None:
            _check_done(out, old, new, advice)
            kept.append(old)
        elif position is None or number < first_open:
            kept.append(old)
        else:
            reached = position.record if number == position.input else 0
            done = _Done(reached, position.checksum, before.text_field, cut)
            kept += _open_input(out, old, new, done)
    return before.model_copy(update={"inputs": tuple(kept), "skip_bad": now.skip_bad})


def _with_those_left_out_today(before: Sequence[Input], now: Sequence[Input], names: Sequence[str]) -> list[Input]:
    """This call's inputs, and files of its folders that were read before and are left out by a later version."""
    known, folders = {source.name for source in now}, [Path(name).expanduser() for name in names]
    left_out = {
        old.name
        for old in before
        if old.name not in known and _unchanged(old) and any(folder in Path(old.name).parents for folder in folders)
    }
    found = {source.name: source for source in now} | {old.name: old for old in before if old.name in left_out}
    if not left_out:
        return list(now)
    order = [source.name for source in before if source.name in found]
    return [found[name] for name in [*order, *(known - set(order))]]


def _unchanged(source: Input) -> bool:
    path = Path(source.name)
    if source.kind == "dataset" or not path.is_file():
        return False
    status = path.stat()
    return (status.st_size, str(status.st_mtime_ns)) == (source.size, source.stamp)


def _same(old: Input, new: Input) -> bool:
    return (old.kind, old.size, old.stamp) == (new.kind, new.size, new.stamp)


def _check_done(out: Path, old: Input, new: Input | None, advice: str) -> None:
    if new is None:
        raise UserError(f"{out} was begun with other inputs ({old.name} is missing): {advice}")
    if not _same(old, new):
        what = f"had size {old.size}, now {new.size}" if old.size != new.size else "was written again"
        raise UserError(f"{out} was begun with another {old.name} (it {what}): bring that back, or {advice}")


@dataclass(frozen=True)
class _Done:
    """How much of an input has been read: so many records, with this checksum.

    Attributes:
        records: their number.
        checksum: of their data, in order.
        field: of the text in a record.
        cut: says where long texts are cut.
    """

    records: int
    checksum: int
    field: str
    cut: Cut | None

    def is_in(self, source: Input) -> bool:
        """Whether an input begins with the records that have been read."""
        checksum = 0
        for record in records(source, self.field, cut=self.cut):
            if record.number > self.records:
                break
            checksum = zlib.crc32(record.data, checksum)
        return checksum == self.checksum


def _open_input(out: Path, old: Input, new: Input | None, done: _Done) -> list[Input]:
    """What becomes of an input that has not been read to its end: itself, its mended form, or what was read of it."""
    if old.taken is not None:
        return [old]
    if new is None:
        return [old.model_copy(update={"taken": done.records})] if done.records else []
    if _same(old, new):
        return [old]
    new = new.model_copy(update={"held_out": old.held_out})
    if done.records and not (new.kind == old.kind and done.is_in(new)):
        raise UserError(
            f"{old.name} differs from what {out} was begun with in the first {done.records:,} records, which are done: "
            "bring those back, or name another folder"
        )
    return [new]
