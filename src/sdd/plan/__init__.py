"""Memory, time and GPU-hours that a run needs on given GPUs, before it is started."""

from sdd.plan.estimate import Plan, make_plan
from sdd.plan.gpus import Gpu, find_gpu, gpus
from sdd.plan.measure import MemoryCase
from sdd.plan.memory import Memory, measure_memory
from sdd.plan.table import show_plan

__all__ = ["Gpu", "Memory", "MemoryCase", "Plan", "find_gpu", "gpus", "make_plan", "measure_memory", "show_plan"]
