"""The process of a stack: `python -m sdd.lab.grid.stack OUT NAME ...` trains the named runs of a grid together.

Each run has its config in OUT/configs and its directory in OUT/runs, as if it had a process of its own; see
`sdd.train.stacked_run`. The loss on the tuning segment, which `harvest` would compute from a checkpoint run by run, is
computed for all runs together and stands in result.json.
"""

import logging
import sys
from itertools import groupby
from pathlib import Path

from sdd.errors import SddError, is_out_of_memory, one_line
from sdd.lab.segments import tuning_windows
from sdd.train import Trainer, config_io
from sdd.train.stacked_run import StackedRun, open_run


def train(out: Path, names: list[str]) -> None:
    """Train the named runs; those that stand at one step together.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, with every run saved.
        UserError: if a run cannot be trained in a stack, or its files are not those of a run.
    """
    opened = [open_run(config_io.load(out / "configs" / f"{name}.json"), out / "runs" / name) for name in names]
    for _, group in groupby(sorted(opened, key=_step), _step):
        trainers = list(group)
        config, validation = trainers[0].config, trainers[0].data.validation
        windows = tuning_windows(validation, config.eval_sequences, config.model.context)
        StackedRun(trainers).run({"tuning_loss": windows})


def _step(trainer: Trainer) -> int:
    return trainer.step


def main(args: list[str]) -> int:
    """Run the process; returns its exit code, as those of the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    out, *names = args
    try:
        train(Path(out), names)
    except SddError as error:
        print(f"sdd: {error.heading}{one_line(error)}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"sdd: failed: not enough memory for a stack of {len(names)} runs: lower --stack", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
