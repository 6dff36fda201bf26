"""What a token costs each method: training steps of all of them in turn, when no run of the study stands beside them.

    OUT/timing.json     seconds a token of each arm; delete it to time them anew

The clocks of runs do not compare methods: what else the machine did while one ran is in them.
"""

import json
import statistics
import uuid
from collections.abc import Mapping
from pathlib import Path

from sdd.errors import UserError
from sdd.lab.grid.timing import step_seconds
from sdd.train import RunConfig
from sdd.train.parallel import pick_device
from sdd.train.run_dir import environment

ROUNDS = 7


def seconds_per_token(configs: Mapping[str, RunConfig], threads: int, out: Path) -> dict[str, float]:
    """Seconds of training a token by name, from OUT/timing.json or else measured and written there.

    Args:
        configs: a run of each method.
        threads: of a run.
        out: the study's folder.

    Raises:
        UserError: if the file is damaged.
    """
    file = out / "timing.json"
    known = _read(file)
    if known.keys() >= configs.keys():
        return {name: known[name] for name in configs}
    rounds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(ROUNDS):
        for name, config in configs.items():
            rounds[name].append(step_seconds(config, threads) / config.tokens_per_step)
    found = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    config = next(iter(configs.values()))
    machine = environment(pick_device(config.device), config.precision)
    values = {
        "seconds_per_token": found,
        "rounds": rounds,
        "environment": {name: value for name, value in machine.items() if name != "command"} | {"threads": threads},
    }
    aside = file.with_name(f".timing.{uuid.uuid4().hex}")  # another machine may write the same
    aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)
    return found


def _read(file: Path) -> dict[str, float]:
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {name: float(seconds) for name, seconds in values["seconds_per_token"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: delete it, and the methods are timed anew") from None
