"""`sdd bench`: the time of fused operations and of training steps on this machine."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from sdd.bench import kernels, step_time
from sdd.bench.operations import HEAD_DIM, OPERATIONS
from sdd.bench.record import Record
from sdd.bench.table import kernels_table, small_table, step_time_table, target_lines
from sdd.bench.timing import can_compile
from sdd.bench.variants import Mode, Setting, configured
from sdd.commands.configs import base_config
from sdd.commands.parser import Parser, choose, listed, one_of, whole_number
from sdd.errors import UserError
from sdd.models import model_presets
from sdd.plan.gpus import find_gpu, gpu_of_device, gpus
from sdd.train.parallel import pick_autocast, pick_device

BENCHMARKS = {
    "kernels": "each fused operation: GB/s and share of a device copy, against composed and compiled",
    "step-time": "a training step of each placement: time, tokens/s, memory and MFU; eager and compiled",
}
#: Settings of the kernels that were not given, by device.
_KERNEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"dtype": "bfloat16", "widths": [2**n for n in range(9, 15)], "mib": 256, "rounds": 50, "compiled": True},
    "cpu": {"dtype": "float32", "widths": [256, 1024], "mib": 8, "rounds": 11, "compiled": False},
}
#: Most tokens of a step, unless --batch is given.
_TOKENS = 8192
_MODES = get_args(Mode)
_size = whole_number(1, 10**8)  # sizes of tensors overflow beyond it


def main(args: list[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        Interrupted: by Ctrl-C, after the results so far are saved.
    """
    name = choose("sdd bench", "benchmark", BENCHMARKS, args)
    if name is None:
        return 0 if args else 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write into the progress bar
    options = (_kernels_parser() if name == "kernels" else _step_time_parser()).parse_known(args[1:])
    if options.threads:
        torch.set_num_threads(options.threads)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    options.device = pick_device(automatic if options.device == "auto" else options.device)
    record, table = (_kernels if name == "kernels" else _step_time)(options)
    if options.json:
        print(record.text(), end="")
    else:
        print(*table(record.values), *target_lines(record.content), f"written to {record.path}", sep="\n")
    return 0


def _kernels_parser() -> Parser:
    parser = Parser(
        "sdd bench kernels",
        "GB/s of each fused operation, forward and backward, and the share of a copy on the same device: our kernels "
        "(on a CPU the written-out backward pass), composed PyTorch, that compiled, Liger where installed.",
        "[--device cuda] [--widths 512,1024] [--out FILE] [OPTIONS]",
    )
    add, names = parser.add_argument, listed(one_of(OPERATIONS))
    add("--operations", metavar="A,B", type=names, default=list(OPERATIONS), help=", ".join(OPERATIONS))
    add("--widths", metavar="N,M", type=listed(_size), help="default 512 to 16384 on a GPU, else 256,1024")
    add("--mib", metavar="N", type=_size, help="of one activation: default 256 on a GPU, else 8")
    dtype = one_of(("bfloat16", "float16", "float32"))
    add("--dtype", type=dtype, help="default bfloat16 on a GPU, else float32")
    add("--small", action="store_true", help="whole eager calls over small sizes, Python included")
    add("--compiled", action=argparse.BooleanOptionalAction, help="torch.compile too (default: on a GPU)")
    return _with_shared(parser, rounds="50 on a GPU, else 11")


def _kernels(options: argparse.Namespace) -> "_Answer":
    defaults = _KERNEL_DEFAULTS[options.device.type]
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    settings = kernels.Settings(device=options.device, names=options.operations, **(defaults | given))
    for width in settings.widths:
        if width % HEAD_DIM or not settings.rows(width):
            raise UserError(f"--widths {width} must be a multiple of {HEAD_DIM}, and a row not more than --mib")
    values = {"rounds": settings.rounds, "dtype": settings.dtype}
    if options.small:
        return _measured("kernels_small", options, values, partial(kernels.measure_small, settings)), small_table
    if settings.compiled:
        _check_compiler(options.device, "--no-compiled")
    values["mib"] = settings.mib
    return _measured("kernels", options, values, partial(kernels.measure, settings)), kernels_table


def _step_time_parser() -> Parser:
    parser = Parser(
        "sdd bench step-time",
        "Time, tokens/s, peak memory and MFU of a training step of each variant, in turn, as ratios to the first one. "
        "A variant is a placement; PLACEMENT+composed is the same model as people compose it, every norm a module "
        "after its Linear, none left out.",
        "[PRESET ...] [--variants A,B] [--block] [--out FILE] [OPTIONS]",
    )
    add, variants = parser.add_argument, list(step_time.VARIANTS)
    presets = "default micro; " + ", ".join(model_presets)
    add("presets", metavar="PRESET", nargs="*", default=["micro"], help=presets)
    add("--variants", metavar="A,B", type=listed(str), default=variants, help="the first is the base")
    add("--modes", metavar="A,B", type=listed(one_of(_MODES)), help=",".join(_MODES))
    add("--block", action="store_true", help="one block alone, forward and backward pass")
    add("--layers", metavar="N", type=_size, help="fewer blocks than the preset has")
    add("--context", metavar="N", type=_size, help="tokens of a sequence")
    add("--batch", metavar="N", type=_size, help=f"sequences (default: the preset's, up to {_TOKENS:,} tokens)")
    precision = one_of(("auto", "bfloat16", "float32"))
    add("--precision", type=precision, default="auto", help="default bfloat16 on a GPU")
    add("--gpu", metavar="NAME", help="for MFU (default: by the device's name): " + ", ".join(gpus))
    add("--profile", action="store_true", help="where the time goes, by operation, against the base")
    return _with_shared(parser, rounds="15")


def _step_time(options: argparse.Namespace) -> "_Answer":
    modes = _modes(options)
    gpu = find_gpu(options.gpu) if options.gpu else None
    if gpu is None and options.device.type == "cuda":
        gpu = gpu_of_device(torch.cuda.get_device_name())
    names, rounds = list(dict.fromkeys(options.variants)), options.rounds or 15
    plans = [
        step_time.StepTimeSettings(preset, _setting(preset, names, options), names, modes, rounds, gpu, options.profile)
        for preset in options.presets
    ]
    name = "step_time_block" if options.block else "step_time"
    return _measured(name, options, {}, partial(step_time.measure, plans)), step_time_table


def _setting(preset: str, names: list[str], options: argparse.Namespace) -> Setting:
    base = base_config(preset)
    shape = base.model
    try:
        shape = replace(shape, n_layers=options.layers or shape.n_layers, context=options.context or shape.context)
        for name in names:
            configured(name, shape)
    except ValueError as error:
        raise UserError(f"{preset}: {error}") from None
    batch = options.batch or max(1, min(base.data.batch_size, _TOKENS // shape.context))
    return Setting(shape, options.block, batch, options.device, pick_autocast(options.precision, options.device))


def _modes(options: argparse.Namespace) -> list[Mode]:
    """The modes asked for; by default both where torch can compile."""
    if options.modes is None:
        return list(_MODES) if can_compile(options.device) else ["eager"]
    if "compiled" in options.modes:
        _check_compiler(options.device, "--modes eager")
    return list(dict.fromkeys(options.modes))


def _with_shared(parser: Parser, rounds: str) -> Parser:
    """The parser with the options that every benchmark has."""
    add, devices = parser.add_argument, one_of(("auto", "cuda", "cpu"))
    add("--rounds", metavar="N", type=_size, help=f"turns of each variant (default {rounds})")
    add("--device", type=devices, default="auto", help="cuda, cpu or auto (default)")
    add("--threads", metavar="N", type=_size, help="of torch on a CPU (default torch's own)")
    add("--out", metavar="FILE", type=Path, help="result file or folder (default: here, a free name)")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def _check_compiler(device: torch.device, instead: str) -> None:
    if not can_compile(device):
        needs = "Triton" if device.type == "cuda" else "g++, and no space in its path"
        raise UserError(f"torch.compile needs {needs}, which is not here: take {instead}")


def _measured(
    name: str, options: argparse.Namespace, values: dict[str, Any], measure: Callable[[Record], None]
) -> Record:
    """The record of a benchmark after `measure` has filled it."""
    what = BENCHMARKS["kernels" if name.startswith("kernels") else "step-time"]
    device = options.device.type
    with Record(f"{name}_{device}", options.out, {"what": what, "device": device} | values) as record:
        measure(record)
    return record


#: The answer of a benchmark: its record, and the function that turns the record into lines of text.
_Answer = tuple[Record, Callable[[dict[str, Any]], list[str]]]
