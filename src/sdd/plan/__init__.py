"""What a run needs of given GPUs, before anything is run."""

from sdd.plan.activations import Activations, count_activations
from sdd.plan.estimate import Plan, make_plan
from sdd.plan.gpus import Gpu, find_gpu, gpus
from sdd.plan.memory import Job, Memory, count_memory
from sdd.plan.table import show_plan

__all__ = [
    "Activations",
    "Gpu",
    "Job",
    "Memory",
    "Plan",
    "count_activations",
    "count_memory",
    "find_gpu",
    "gpus",
    "make_plan",
    "show_plan",
]
