"""Insert the output of an `sdd` command, run when the page is built."""

import shlex
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from sdd.commands.main import main


class CommandOutput(SphinxDirective):
    """Run `sdd` with the arguments given and insert its output."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The output as it stands."""
        output, errors = StringIO(), StringIO()
        with redirect_stdout(output), redirect_stderr(errors):
            code = main(shlex.split(self.arguments[0]))
        if code:
            raise self.error(f"sdd {self.arguments[0]} exits with {code}: {errors.getvalue().strip()}")
        return [nodes.literal_block(output.getvalue(), output.getvalue(), language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-output", CommandOutput)
    return {"parallel_read_safe": True}
