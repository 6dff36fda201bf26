"""Layouts of small models, traced without numbers and on real processes."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from sdd.models import LanguageModel
from sdd.plan.sharded import trace_step
from sdd.plan.traffic import ALL_TO_ALL, Volume
from sdd.train.sharding import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from helpers_parallel import in_world


def on_two_processes(function, *args):
    """What `function(world, *args)` returns on each of two processes."""
    return in_world(2, function, *args)


def real_traces(case, layouts):
    """The traces of real processes, a layout after the other: those of the first, where rows go evenly to experts.

    Where they go depends on the numbers. On all processes together they are as many.
    """
    return [_even(traces) for traces in zip(*in_world(case.gpus, _trace_all, case, layouts), strict=True)]


def _even(traces):
    """The first trace, with the mean over all of what an all-to-all sends."""
    first = traces[0]
    means = {
        stream: Volume(volume.calls, sum(trace.of_pass[stream].size for trace in traces) / len(traces))
        for stream, volume in first.of_pass.items()
        if stream.kind == ALL_TO_ALL and len(stream.ranks) == len(traces)
    }
    return replace(first, of_pass=first.of_pass | means)


def _trace_all(world, case, layouts):
    torch.set_num_threads(1)
    found = []
    for layout in layouts:
        laid_out = world.laid_out(layout, case.model, torch.device("cpu"))
        dtype = torch.bfloat16 if case.bfloat16 else None
        model = build_model(LanguageModel(case.model, "meta"), torch.device("cpu"), dtype, laid_out)
        found.append(trace_step(model, case, laid_out))
    return found


def with_optimizer(case, name):
    return replace(case, run=replace(case.run, optim=replace(case.run.optim, name=name)))
