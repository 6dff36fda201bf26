"""Several gloo processes on this machine, without a run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from helpers_parallel import in_world


def in_processes(size, function, *args):
    """`function(rank, *args)` in each of `size` processes that form a group; the answers in rank order."""
    return in_world(size, _call, function, args)


def _call(world, function, args):
    return function(world.rank, *args)
