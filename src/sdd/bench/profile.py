"""Where the time of a step goes: the operations of torch's profiler, by the time that they take themselves."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler_util import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity

#: Steps that are looked at.
STEPS = 3
#: Operations that a result keeps.
KEPT = 60


@contextmanager
def kernel_names(wanted: bool) -> Iterator[None]:
    """Let what inductor compiles for a CPU inside the block appear in profiles kernel by kernel."""
    if not wanted:
        yield
        return
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def times_of(run: Callable[[], Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds and calls a step of each operation, the slowest first: kernels on a GPU, operations on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profile.key_averages():
        is_kernel = event.device_type != DeviceType.CPU
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if is_kernel == on_gpu and time > 0:
            row = found.setdefault(common_name(event.key), {"ms": 0.0, "calls": 0.0})
            row["ms"] += time / 1e3 / STEPS
            row["calls"] += event.count / STEPS
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"])[:KEPT])


def common_name(name: str) -> str:
    """A compiled kernel's name without the numbers by which one variant's differ from another's."""
    name = re.sub(r"^## Call CompiledFxGraph \S+ ##$", "CompiledFxGraph", name)
    return re.sub(r"^graph_\d+_(?=cpp_)|(?<=_)\d+$", "", name).rstrip("_") if "fused" in name else name


def differences(own: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Milliseconds a step that a variant spends more than the baseline, by operation, the largest difference first."""
    names = own.keys() | base.keys()
    nothing = {"ms": 0.0}
    found = {name: own.get(name, nothing)["ms"] - base.get(name, nothing)["ms"] for name in names}
    return dict(sorted(found.items(), key=lambda item: (-abs(item[1]), item[0])))
