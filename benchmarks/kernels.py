"""Each fused operation, forward and backward: GB/s and share of a device copy, against composed, compiled and Liger.

Bytes are those that must move: activations read and written once each way. Variants take turns, one call each, and the
median of all turns counts. Not controlled: clocks and other users of the device. `--small` compares whole eager calls,
Python included, over small sizes instead: where the kernels begin to pay.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from _record import write_result
from sdd import functional as sdd_F
from sdd import kernels

HEAD_DIM = 64


@dataclass
class Operation:
    """A function of activations, alphas and constants, and how many activations must move forward and backward."""

    function: Callable[..., Any]
    n_activations: int
    n_alphas: int
    forward: int
    backward: int
    options: dict[str, Any]


def operations(rows: int, width: int, device: str) -> dict[str, Operation]:
    cos, sin = sdd_F.rope_tables(rows, HEAD_DIM, device=device)

    def qk(z: Tensor, alpha: Tensor) -> Tensor:
        return kernels.qk_norm_rope(z, alpha[:HEAD_DIM], cos, sin, n_heads=width // HEAD_DIM, group=HEAD_DIM)

    def post_norm(z: Tensor, residual: Tensor, post_alpha: Tensor) -> Tensor:
        return kernels.residual_norm(z, residual, None, post_alpha)

    return {
        "norm": Operation(kernels.scaled_norm, 1, 1, 2, 3, {}),
        "norm-by-head": Operation(kernels.scaled_norm, 1, 1, 2, 3, {"group": HEAD_DIM}),
        "swiglu": Operation(kernels.swiglu, 2, 0, 3, 5, {}),
        "sdd-swiglu": Operation(kernels.sdd_swiglu, 2, 2, 3, 5, {}),
        "sdd-swiglu-joint": Operation(kernels.sdd_swiglu, 2, 2, 3, 5, {"joint": True}),
        "residual": Operation(kernels.residual_norm, 2, 1, 3, 3, {}),
        "residual-post-norm": Operation(kernels.residual_norm, 2, 2, 3, 5, {}),
        "post-norm": Operation(post_norm, 2, 1, 3, 5, {}),
        "residual-pre-norm": Operation(kernels.residual_prenorm, 2, 2, 4, 6, {}),
        "qk-norm-rope": Operation(qk, 1, 1, 2, 3, {}),
    }


def variants(name: str, operation: Operation, device: str, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Callables of the operation's tensors."""

    def on(path: kernels.Path, function: Callable[..., Any], *tensors: Tensor) -> Any:
        with kernels.use(path):
            return function(*tensors, **operation.options)

    fast: kernels.Path = "triton" if device == "cuda" else "recompute"
    found: dict[str, Callable[..., Any]] = {path: partial(on, path, operation.function) for path in (fast, "composed")}
    if compiled:
        found["compiled composed"] = partial(on, "composed", torch.compile(operation.function, dynamic=False))
    if device == "cuda" and find_spec("liger_kernel"):
        found |= liger(name)
    return found


def liger(name: str) -> dict[str, Callable[..., Any]]:
    """What Liger has of the same function."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    if name == "norm":
        return {"liger": lambda z, alpha: LigerRMSNormFunction.apply(z, alpha, 1e-6)}
    return {"liger": LigerSiLUMulFunction.apply} if name == "swiglu" else {}


def seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call: the device's time, or the clock on a CPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_time = time.perf_counter()
    call()
    return time.perf_counter() - start_time


def inputs_of(operation: Operation, rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    activations = [torch.randn(1, rows, width, device=device).to(dtype) for _ in range(operation.n_activations)]
    return [x.requires_grad_() for x in [*activations, *torch.rand(operation.n_alphas, width, device=device)]]


def outputs_of(y: Any) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y


def measure(
    name: str, rows: int, width: int, dtype: torch.dtype, device: str, rounds: int, compiled: bool
) -> dict[str, dict[str, float]]:
    """GB/s forward and backward of every variant, medians over the rounds."""
    operation = operations(rows, width, device)[name]
    inputs = inputs_of(operation, rows, width, dtype, device)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for variant, function in variants(name, operation, device, compiled).items():
        outputs = outputs_of(function(*inputs))
        gradients = [torch.randn_like(y) for y in outputs]
        backward = partial(torch.autograd.grad, outputs, inputs, gradients, retain_graph=True)
        backward()
        calls[variant, "forward"], calls[variant, "backward"] = partial(function, *inputs), backward
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(seconds(call, device))
    size = rows * width * dtype.itemsize / 1e9
    moved = {"forward": operation.forward * size, "backward": operation.backward * size}
    found: dict[str, dict[str, float]] = {}
    for (variant, direction), taken in times.items():
        found.setdefault(variant, {})[direction] = moved[direction] / statistics.median(taken)
    return found


def copy_bandwidth(n_bytes: int, device: str, rounds: int) -> float:
    """GB/s of a copy, read and written bytes counted."""
    source = torch.empty(n_bytes // 2, dtype=torch.bfloat16, device=device).zero_()
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [seconds(lambda: target.copy_(source), device) for _ in range(rounds)]
    return 2 * n_bytes / 1e9 / statistics.median(taken)


def small(device: str, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a whole eager forward and backward call of the norm over small sizes, Python included."""
    found = []
    for rows in (1, 16, 64, 256, 1024, 4096):
        for width in (256, 2048):
            operation = operations(rows, width, device)["norm"]
            inputs = inputs_of(operation, rows, width, torch.bfloat16 if device == "cuda" else torch.float32, device)
            dy = torch.randn_like(inputs[0])
            times: dict[str, list[float]] = {}
            for _ in range(rounds):
                for variant, function in variants("norm", operation, device, False).items():
                    start = time.perf_counter()
                    for _ in range(5):
                        torch.autograd.grad(function(*inputs), inputs, dy)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    times.setdefault(variant, []).append((time.perf_counter() - start) / 5)
            row = {variant: 1e6 * statistics.median(taken) for variant, taken in times.items()}
            found.append({"rows": rows, "width": width, "numel": rows * width, "microseconds": row})
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure and write benchmarks/results/kernels_DEVICE.json."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    widths = [512, 1024, 2048, 4096, 8192, 16384] if on_gpu else [256, 1024]
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--widths", type=int, nargs="+", default=widths)
    parser.add_argument(
        "--mib", type=int, default=256 if on_gpu else 8, help="of one activation; more than caches hold"
    )
    parser.add_argument("--rounds", type=int, default=50 if on_gpu else 11)
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--operations", nargs="+", choices=list(operations(1, HEAD_DIM, "cpu")))
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=on_gpu, help="torch.compile too")
    parser.add_argument("--small", action="store_true", help="whole eager calls over small sizes instead")
    args = parser.parse_args()
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, args.dtype)
    values: dict[str, Any] = {"device": device, "rounds": args.rounds, "driver": driver()}
    if args.small:
        values["small"] = small(device, args.rounds)
        print(f"written to {write_result(f'kernels_small_{device}', values)}")
        return
    values |= {"dtype": args.dtype, "mib": args.mib, "copy": copy_bandwidth(args.mib << 20, device, args.rounds)}
    print(f"copy {values['copy']:.0f} GB/s")
    values["operations"] = []
    for name in args.operations or operations(1, HEAD_DIM, "cpu"):
        for width in args.widths:
            rows = (args.mib << 20) // (width * dtype.itemsize)
            found = measure(name, rows, width, dtype, device, args.rounds, args.compiled)
            values["operations"].append({"operation": name, "rows": rows, "width": width, "gb_per_second": found})
            text = "  ".join(
                f"{variant} {speed['forward'] / values['copy']:.0%} {speed['backward'] / values['copy']:.0%}"
                for variant, speed in found.items()
            )
            print(f"{name:20} {width:6}  {text}", flush=True)
    print(f"written to {write_result(f'kernels_{device}', values)}; shares of the copy, forward and backward")


def driver() -> str | None:
    """The NVIDIA driver's version."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    main()
