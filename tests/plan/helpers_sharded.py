"""Layouts of small models, traced without numbers and on real processes."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from sdd.models import LanguageModel
from sdd.plan.sharded import trace_step
from sdd.train.sharding import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from helpers_parallel import in_world


def real_traces(case, layouts):
    """The traces of the first process of real ones, a layout after the other."""
    return in_world(case.gpus, _trace_all, case, layouts)[0]


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
