"""Make reStructuredText of docstrings that are written to be read in a terminal.

A formula stands by itself there, indented after a blank line, and a table between bars: `::` before either keeps its
lines as they stand. A list may follow its text without a blank line, and a description may be one letter, which is no
enumeration. Type aliases are shown by name.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any, get_args

from sphinx.application import Sphinx

from sdd import placement

ALIASES = {name: getattr(placement, name) for name in ("Site", "AlphaName", "InitName")}
_plain: dict[str, list[str]] = {}


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText with napoleon's sections."""
    rst: list[str] = []
    text_indent = 0  # of the last line that is no code
    for is_blank, group in groupby(lines, lambda line: not line.strip()):
        block = list(group)
        if not is_blank and (block[0].lstrip().startswith("|") or indent(block[0]) > text_indent):
            block = [" " * text_indent + "::", "", *(f"    {line}" for line in block)]
        elif not is_blank:
            text_indent = indent(block[-1])
            block = list(text_lines(block))
        rst += block
    return rst


def text_lines(block: list[str]) -> Iterator[str]:
    """Lines of text, with a blank one before a list that is indented."""
    last_indent = indent(block[0])
    for line in block:
        if line.lstrip().startswith("- ") and indent(line) > last_indent:
            yield ""
        last_indent = indent(line)
        yield re.sub(r"^(\s*\w+: )([A-Z]\.)$", r"\1\\\2", line)


def indent(line: str) -> int:
    """Number of spaces before the text."""
    return len(line) - len(line.lstrip())


def name_aliases(text: str) -> str:
    """A signature with the names of the aliases in place of their members."""
    for name, alias in ALIASES.items():
        text = text.replace("Literal[" + ", ".join(map(repr, get_args(alias))) + "]", name)
    return text.replace("~typing.", "").replace("~sdd.placement.", "")


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)
    if what in ("attribute", "data", "property"):  # napoleon would take the text before a colon for a type
        _plain[name] = list(lines)


def _restore(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _plain.pop(name, lines)


def _process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    return signature and name_aliases(signature), returns and name_aliases(returns)


def setup(app: Sphinx) -> dict[str, bool]:
    """Process each docstring before napoleon turns its sections into field lists."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=600)
    app.connect("autodoc-process-signature", _process_signature)
    return {"parallel_read_safe": True}
