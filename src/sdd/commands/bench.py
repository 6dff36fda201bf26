"""`sdd bench`: the time of fused operations and of training steps on this machine."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
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
from sdd.train.device import pick_autocast, pick_device

BENCHMARKS = {
    "kernels": "each fused operation: GB/s and share of a device copy, against composed and compiled",
    "step-time": "a training step of each placement: time, tokens/s, memory and MFU; eager and compiled",
}
#: Settings of the kernels that were not given, by device.
_KERNELS_ON = {
    "cuda": {
        "dtype": "bfloat16",
        "widths": [512, 1024, 2048, 4096, 8192, 16384],
        "mib": 256,
        "rounds": 50,
        "compiled": True,
    },
    "cpu": {"dtype": "float32", "widths": [256, 1024], "mib": 8, "rounds": 11, "compiled": False},
}
#: Most tokens of a step, unless --batch is given.
_TOKENS = 8192
_MODES = get_args(Mode)
#: Sizes of tensors overflow beyond it.
_size = whole_number(1, 10**8)


def main(args: list[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        Interrupted: by Ctrl-C, after the results so far are saved.
    """
    name = choose("sdd bench", "benchmark", BENCHMARKS, args)
    if name is None:
        return 0 if args else 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write into the progress bar
    return _kernels(args[1:]) if name == "kernels" else _step_time(args[1:])


def _kernels(args: list[str]) -> int:
    parser = Parser(
        prog="sdd bench kernels",
        description="GB/s of each fused operation, forward and backward, and the share of a copy on the same device: "
        "our kernels (on a CPU the written-out backward pass), composed PyTorch, that compiled, Liger where installed.",
        usage="sdd bench kernels [--device cuda] [--widths 512,1024] [--out FILE] [OPTIONS]",
        allow_abbrev=False,
    )
    names, known = listed(one_of(OPERATIONS)), ", ".join(OPERATIONS)
    parser.add_argument("--operations", metavar="A,B", type=names, default=list(OPERATIONS), help=known)
    about = "default 512 to 16384 on a GPU, else 256,1024"
    parser.add_argument("--widths", metavar="N,M", type=listed(_size), help=about)
    parser.add_argument("--mib", metavar="N", type=_size, help="of one activation: default 256 on a GPU, else 8")
    dtype = one_of(("bfloat16", "float16", "float32"))
    parser.add_argument("--dtype", type=dtype, help="default bfloat16 on a GPU, else float32")
    parser.add_argument("--small", action="store_true", help="whole eager calls over small sizes, Python included")
    about = "torch.compile too (default: on a GPU)"
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help=about)
    options = _parse(parser, args, rounds="50 on a GPU, else 11")
    settings = _kernel_settings(options)
    values = {"rounds": settings.rounds, "dtype": settings.dtype}
    if options.small:
        with _record("kernels_small", "kernels", options, values) as record:
            kernels.measure_small(settings, record)
        return _answer(record, small_table, options)
    with _record("kernels", "kernels", options, values | {"mib": settings.mib}) as record:
        kernels.measure(settings, record)
    return _answer(record, kernels_table, options)


def _kernel_settings(options: argparse.Namespace) -> kernels.Settings:
    defaults = _KERNELS_ON[options.device.type]
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    settings = kernels.Settings(device=options.device, names=options.operations, **(defaults | given))
    for width in settings.widths:
        if width % HEAD_DIM or not settings.rows(width):
            raise UserError(f"--widths {width} must be a multiple of {HEAD_DIM}, and a row not more than --mib")
    if settings.compiled and not options.small:
        _check_compiler(options.device, "--no-compiled")
    return settings


def _step_time(args: list[str]) -> int:
    parser = Parser(
        prog="sdd bench step-time",
        description="Time, tokens/s, peak memory and MFU of a training step of each variant, in turn, as ratios to the "
        "first one. A variant is a placement; PLACEMENT+composed is the same model as people compose it, every norm a "
        "module after its Linear, none left out.",
        usage="sdd bench step-time [PRESET ...] [--variants A,B] [--block] [--out FILE] [OPTIONS]",
        allow_abbrev=False,
    )
    about = "default micro; " + ", ".join(model_presets)
    parser.add_argument("presets", metavar="PRESET", nargs="*", default=["micro"], help=about)
    variants = list(step_time.VARIANTS)
    about = "the first is the base"
    parser.add_argument("--variants", metavar="A,B", type=listed(str), default=variants, help=about)
    parser.add_argument("--modes", metavar="A,B", type=listed(one_of(_MODES)), help=",".join(_MODES))
    parser.add_argument("--block", action="store_true", help="one block alone, forward and backward pass")
    parser.add_argument("--layers", metavar="N", type=_size, help="fewer blocks than the preset has")
    parser.add_argument("--context", metavar="N", type=_size, help="tokens of a sequence")
    about = f"sequences (default: the preset's, up to {_TOKENS:,} tokens)"
    parser.add_argument("--batch", metavar="N", type=_size, help=about)
    precision = one_of(("auto", "bfloat16", "float32"))
    parser.add_argument("--precision", type=precision, default="auto", help="default bfloat16 on a GPU")
    parser.add_argument("--gpu", metavar="NAME", help="for MFU (default: by the device's name): " + ", ".join(gpus))
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operation, against the base")
    options = _parse(parser, args, rounds="15")
    modes = _modes(options)
    if options.gpu:
        gpu = find_gpu(options.gpu)
    else:
        gpu = gpu_of_device(torch.cuda.get_device_name()) if options.device.type == "cuda" else None
    names = list(dict.fromkeys(options.variants))
    plans = [
        step_time.Plan(
            preset, _setting(preset, names, options), names, modes, options.rounds or 15, gpu, options.profile
        )
        for preset in options.presets
    ]
    with _record("step_time" + ("_block" if options.block else ""), "step-time", options, {}) as record:
        step_time.measure(plans, record)
    return _answer(record, step_time_table, options)


def _setting(preset: str, names: list[str], options: argparse.Namespace) -> Setting:
    base = base_config(preset)
    sizes = {"n_layers": options.layers, "context": options.context}
    try:
        shape = replace(base.model, **{name: size for name, size in sizes.items() if size})
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


def _parse(parser: Parser, args: list[str], rounds: str) -> argparse.Namespace:
    """Parse what is asked for, and the options of every benchmark; `device` becomes a torch.device."""
    parser.add_argument("--rounds", metavar="N", type=_size, help=f"turns of each variant (default {rounds})")
    devices = one_of(("auto", "cuda", "cpu"))
    parser.add_argument("--device", type=devices, default="auto", help="cuda, cpu or auto (default)")
    parser.add_argument("--threads", metavar="N", type=_size, help="of torch on a CPU (default torch's own)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="result file or folder (default: here, a free name)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_known(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    options.device = pick_device(automatic if options.device == "auto" else options.device)
    return options


def _check_compiler(device: torch.device, instead: str) -> None:
    if not can_compile(device):
        needs = "Triton" if device.type == "cuda" else "g++, and no space in its path"
        raise UserError(f"torch.compile needs {needs}, which is not here: take {instead}")


def _record(name: str, benchmark: str, options: argparse.Namespace, values: dict[str, Any]) -> Record:
    device = options.device.type
    return Record(f"{name}_{device}", options.out, {"what": BENCHMARKS[benchmark], "device": device} | values)


def _answer(record: Record, table: Callable[[dict[str, Any]], list[str]], options: argparse.Namespace) -> int:
    if options.json:
        print(record.text(), end="")
    else:
        print(*table(record.values), *target_lines(record.content), f"written to {record.path}", sep="\n")
    return 0
