"""Run the code of a Markdown page, block after block, in the present folder.

```python     runs in this process, all blocks of a page in one namespace
```sh         runs in bash, which stops at the first command that fails
```text       is what the block above it printed: the same words; digits may differ, `...` stands for any text or none

Comments of HTML, which no reader sees, stand on the line above a block:

<!-- exits: 2 -->                     the shell block ends with this exit code
<!-- skip: next "REASON" -->          the block is not run
<!-- file: NAME -->                  the block is written to this file of the folder, not run
<!-- invisible-code: python ... -->   code that only the test runs
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from unittest import SkipTest

from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

LANGUAGES = ("python", "sh", "text")
_NUMBER = re.compile(r"[-+]?\d+([.,:]\d+)*(e[-+]?\d+)?")


class Page:
    """The blocks of a page, and what the last one printed."""

    def __init__(self, path: Path) -> None:
        code = [CodeBlockParser("python", self._python), CodeBlockParser("sh", self._shell)]
        text = CodeBlockParser("text", self._text)
        sybil = Sybil(parsers=[*code, text, SkipParser(), self._exit_codes, self._files])
        self.document = sybil.parse(path)
        self.output, self.exit_code, self.file = "", 0, ""

    def run(self) -> list[str]:
        """Run all blocks in order; the reasons of those that are not run."""
        skipped = []
        for example in self.document:
            try:
                example.evaluate()
            except SkipTest as reason:
                skipped.append(str(reason))
        return skipped

    def _python(self, example: Example) -> None:
        if self.file:
            Path(self.file).write_text(example.parsed, encoding="utf-8")
            self.file = ""
            return
        with redirect_stdout(io.StringIO()) as printed:
            PythonEvaluator()(example)
        self.output = printed.getvalue()

    def _shell(self, example: Example) -> str | None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # one thread of a CPU: pages show what that prints, and other tests run beside
        env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = ["bash", "-e", "-o", "pipefail", "-c", example.parsed]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=False
        )
        self.output, wanted, self.exit_code = done.stdout, self.exit_code, 0
        return None if done.returncode == wanted else f"exit code {done.returncode}, not {wanted}:\n{done.stdout}"

    def _text(self, example: Example) -> str | None:
        if same_words(example.parsed, self.output):
            return None
        return f"the page shows\n{example.parsed}\nbut the block above it printed\n{self.output}"

    def _exit_codes(self, document: Document) -> Iterable[Region]:
        for region in DirectiveInHTMLCommentLexer("exits")(document):
            yield Region(region.start, region.end, int(region.lexemes["arguments"]), self._expect)

    def _files(self, document: Document) -> Iterable[Region]:
        for region in DirectiveInHTMLCommentLexer("file")(document):
            yield Region(region.start, region.end, region.lexemes["arguments"].strip(), self._write)

    def _write(self, example: Example) -> None:
        self.file = example.parsed

    def _expect(self, example: Example) -> None:
        self.exit_code = example.parsed


def same_words(shown: str, printed: str) -> bool:
    """Whether a text is what was printed, but for white space and digits; `...` stands for any text."""
    shown, printed = (" ".join(_NUMBER.sub("#", text).split()) for text in (shown, printed))
    return re.fullmatch(".*".join(map(re.escape, re.split(r" ?\.\.\. ?", shown))), printed) is not None


def skipped(path: Path) -> list[str]:
    """The reasons of the blocks of a page that are not run."""
    return re.findall(r'<!-- skip: next "(.+)" -->', path.read_text(encoding="utf-8"))


def languages(path: Path) -> set[str]:
    """The words after the opening fences of a page, but for the directives of Sphinx."""
    lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))
    found = {region.lexemes["language"] for region in lexer(Document(path.read_text(encoding="utf-8"), str(path)))}
    return {word for word in found if not word.startswith("{")}
