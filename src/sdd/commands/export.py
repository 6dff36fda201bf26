"""`sdd export`: a run as a folder for transformers."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from sdd.commands.parser import Parser
from sdd.interop.architecture import CLASSES
from sdd.interop.export import export_run


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("sdd export", "Write a run as a folder that transformers loads.", "RUN DIR [OPTIONS]")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("out", metavar="DIR", type=Path, help="new folder")
    parser.add_argument("--checkpoint", metavar="STEP|PATH", help="this one, also of a run that is not finished")
    parser.add_argument("--fold", action="store_true", help="merge norms into matrices where inference allows it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_known(args)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = export_run(options.run, options.out, checkpoint=options.checkpoint, folded=options.fold, say=say)
    if options.json:
        print(json.dumps({"class": CLASSES[found.kind], **asdict(found)}))
        return 0
    print(*found.remarks, f"done: {CLASSES[found.kind]} in {options.out}; {found.agreement}", sep="\n")
    return 0
