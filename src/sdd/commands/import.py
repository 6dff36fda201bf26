"""`sdd import`: a model of transformers as a run."""

import json
import sys
from pathlib import Path

from sdd.commands.configs import SHORT, add_fields, overrides
from sdd.commands.parser import Parser
from sdd.interop.architecture import CLASSES
from sdd.interop.imported import import_model


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "sdd import",
        "Take a Llama, Qwen3 or Olmo2 of transformers, or an export of a run, as a run at step 0. Every field of the "
        "run can be set; of the model, only its context.",
        "DIR --out RUN [--data PATH] [--steps N] [--lr X] [OPTIONS]",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with config.json, weights and tokenizer.json")
    parser.add_argument("--out", metavar="RUN", type=Path, required=True, help="new run directory")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_fields(parser, {name: short for name, short in SHORT.items() if not name.startswith("model.")})
    options = parser.parse_known(args)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = import_model(options.folder, options.out, overrides(options), say)
    if options.json:
        result = {"class": CLASSES[found.kind], "difference": found.difference, "remarks": found.remarks}
        print(json.dumps({"run": str(options.out), **result}))
        return 0
    placement = found.config.model.placement.name or "own placement"
    print(
        *found.remarks,
        f"done: {CLASSES[found.kind]} as {placement} in {options.out}, float32 logits within {found.difference:.1e} of "
        f"their std; go on with: sdd resume {options.out}",
        sep="\n",
    )
    return 0
