"""`sdd report`: the page of one or more runs."""

from pathlib import Path

from sdd.commands.parser import Parser
from sdd.report.page import write_report


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("sdd report", "Write one self-contained page about one or more runs.", allow_abbrev=True)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run)")
    options = parser.parse_known(args)
    out = options.out or options.runs[0] / "report.html"
    print(*write_report(options.runs, out), f"wrote {out}", sep="\n")
    return 0
