"""Tables of aligned plain text."""

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[object]], right: Collection[int] = ()) -> list[str]:
    """Rows as lines with aligned columns; those in `right` are flushed right."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in text
    ]


def indented(lines: Sequence[str]) -> list[str]:
    """The same lines two spaces further in."""
    return [f"  {line}" for line in lines]
