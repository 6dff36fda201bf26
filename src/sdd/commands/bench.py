"""`sdd bench`: its options."""

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
from sdd.commands.parser import Parser, base_config, positive_int
from sdd.errors import UserError
from sdd.models import model_presets
from sdd.plan.gpus import Gpu, find_gpu, gpu_of_device, gpus
from sdd.train import config_io
from sdd.train.device import pick_autocast, pick_device

DTYPES = ("bfloat16", "float16", "float32")
#: Tokens of a step unless asked otherwise, where the preset's own batch has more.
TOKENS = 8192
#: Largest number that an option takes: beyond it the arithmetic of tensors overflows.
_LARGEST = 10**8


def run(args: list[str]) -> int:
    """The command; returns its exit code.

    Raises:
        UserError: for a mistake in the arguments.
        Interrupted: by Ctrl-C, after what was measured is saved.
    """
    benchmarks = {
        "kernels": (_kernels, "each fused operation: GB/s and share of a device copy, against composed and compiled"),
        "step-time": (
            _step_time,
            "a training step of each placement: time, tokens/s, memory and MFU; eager and compiled",
        ),
    }
    if not args or args[0] in ("-h", "--help"):
        print("usage: sdd bench NAME ...   (sdd bench NAME --help explains)\n")
        for name, (_, about) in benchmarks.items():
            print(f"  {name:9}  {about}")
        return 0 if args else 2
    if args[0] not in benchmarks:
        near = config_io.nearest(args[0], list(benchmarks))
        raise UserError(f"no benchmark {args[0]!r}{near}; choose one of {', '.join(benchmarks)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes about itself into the progress bar
    return benchmarks[args[0]][0](args[1:])


def _kernels(args: list[str]) -> int:
    parser = Parser(
        prog="sdd bench kernels",
        description="GB/s of each fused operation, forward and backward, and the share of a copy on the same device: "
        "our kernels (on a CPU the written-out backward pass), composed PyTorch, that compiled, Liger where installed.",
        usage="sdd bench kernels [--device cuda] [--widths 512,1024] [--out FILE] [OPTIONS]",
        allow_abbrev=False,
    )
    many = _listed(_size)
    parser.add_argument("--operations", metavar="A,B", type=_listed(_one_of(OPERATIONS)), help=", ".join(OPERATIONS))
    parser.add_argument("--widths", metavar="N,M", type=many, help="default 512 to 16384 on a GPU, else 256,1024")
    parser.add_argument("--mib", metavar="N", type=_size, help="of one activation: default 256 on a GPU, else 8")
    parser.add_argument("--dtype", type=_one_of(DTYPES), help="default bfloat16 on a GPU, else float32")
    parser.add_argument("--small", action="store_true", help="whole eager calls over small sizes, Python included")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, help="torch.compile too (default: on a GPU)"
    )
    _add_shared(parser, rounds="50 on a GPU, else 11")
    options = parser.parse_known(args)
    settings = _kernel_settings(options)
    what = "kernels_small" if options.small else "kernels"
    values: dict[str, Any] = {"what": _what(kernels), "device": settings.device.type, "rounds": settings.rounds}
    values |= {"dtype": settings.dtype} | ({} if options.small else {"mib": settings.mib})
    with Record(f"{what}_{settings.device.type}", options.out, values) as record:
        (kernels.measure_small if options.small else kernels.measure)(settings, record)
    return _answer(record, small_table if options.small else kernels_table, options.json)


def _kernel_settings(options: argparse.Namespace) -> kernels.Settings:
    device = _device(options)
    on_gpu = device.type == "cuda"
    settings = kernels.Settings(
        device=device,
        dtype=options.dtype or ("bfloat16" if on_gpu else "float32"),
        names=options.operations or list(OPERATIONS),
        widths=options.widths or ([512, 1024, 2048, 4096, 8192, 16384] if on_gpu else [256, 1024]),
        mib=options.mib or (256 if on_gpu else 8),
        rounds=options.rounds or (50 if on_gpu else 11),
        compiled=on_gpu if options.compiled is None else options.compiled,
    )
    for width in settings.widths:
        if width % HEAD_DIM or not settings.rows(width):
            raise UserError(f"--widths {width} must be a multiple of {HEAD_DIM}, and a row not more than --mib")
    if settings.compiled and not options.small:
        _check_compiler(device, "--no-compiled")
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
    names = ", ".join(model_presets)
    parser.add_argument("presets", metavar="PRESET", nargs="*", default=["micro"], help=f"default micro; {names}")
    parser.add_argument(
        "--variants", metavar="A,B", type=_listed(str), default=list(step_time.VARIANTS), help="the first is the base"
    )
    parser.add_argument("--modes", metavar="A,B", type=_listed(_one_of(get_args(Mode))), help="eager,compiled")
    parser.add_argument("--block", action="store_true", help="one block alone, forward and backward pass")
    parser.add_argument("--layers", metavar="N", type=_size, help="fewer blocks than the preset has")
    parser.add_argument("--context", metavar="N", type=_size, help="tokens of a sequence")
    parser.add_argument(
        "--batch", metavar="N", type=_size, help=f"sequences (default: the preset's, up to {TOKENS:,} tokens)"
    )
    parser.add_argument(
        "--precision", type=_one_of(("auto", "bfloat16", "float32")), default="auto", help="default bfloat16 on a GPU"
    )
    parser.add_argument("--gpu", metavar="NAME", help="for MFU (default: by the device's name): " + ", ".join(gpus))
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operation, against the base")
    _add_shared(parser, rounds="15")
    options = parser.parse_known(args)
    device = _device(options)
    modes = _modes(options, device)
    gpu = _gpu(options, device)
    plans = [_plan(preset, options, device, modes, gpu) for preset in options.presets]
    what = "step_time" + ("_block" if options.block else "")
    values = {"what": _what(step_time), "device": device.type}
    with Record(f"{what}_{device.type}", options.out, values) as record:
        step_time.measure(plans, record)
    return _answer(record, step_time_table, options.json)


def _plan(
    preset: str, options: argparse.Namespace, device: torch.device, modes: list[Mode], gpu: Gpu | None
) -> step_time.StepTimeSettings:
    base = base_config(preset)
    shape = base.model
    names = list(dict.fromkeys(options.variants))
    try:
        shape = replace(shape, n_layers=options.layers or shape.n_layers, context=options.context or shape.context)
        for name in names:
            configured(name, shape)
    except ValueError as error:
        raise UserError(f"{preset}: {error}") from None
    batch = options.batch or max(1, min(base.data.batch_size, TOKENS // shape.context))
    setting = Setting(shape, options.block, batch, device, pick_autocast(options.precision, device))
    return step_time.StepTimeSettings(preset, setting, names, modes, options.rounds or 15, gpu, options.profile)


def _modes(options: argparse.Namespace, device: torch.device) -> list[Mode]:
    """Those asked for; by itself both, where torch can compile."""
    if options.modes and "compiled" in options.modes:
        _check_compiler(device, "--modes eager")
    if options.modes:
        return list(dict.fromkeys(options.modes))
    return list(get_args(Mode)) if can_compile(device) else ["eager"]


def _gpu(options: argparse.Namespace, device: torch.device) -> Gpu | None:
    if options.gpu:
        return find_gpu(options.gpu)
    if device.type != "cuda":
        return None
    return gpu_of_device(torch.cuda.get_device_name())


def _add_shared(parser: Parser, rounds: str) -> None:
    parser.add_argument("--rounds", metavar="N", type=_size, help=f"turns of each variant (default {rounds})")
    parser.add_argument(
        "--device", type=_one_of(("auto", "cuda", "cpu")), default="auto", help="cuda, cpu or auto (default)"
    )
    parser.add_argument("--threads", metavar="N", type=_size, help="of torch on a CPU (default torch's own)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="result file or folder (default: here, a free name)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _device(options: argparse.Namespace) -> torch.device:
    if options.threads:
        torch.set_num_threads(options.threads)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return pick_device(automatic if options.device == "auto" else options.device)


def _check_compiler(device: torch.device, instead: str) -> None:
    if not can_compile(device):
        needs = "Triton" if device.type == "cuda" else "g++, and no space in its path"
        raise UserError(f"torch.compile needs {needs}, which is not here: take {instead}")


def _answer(record: Record, table: Callable[[dict[str, Any]], list[str]], as_json: bool) -> int:
    if as_json:
        print(record.text(), end="")
        return 0
    print(*table(record.values), *target_lines(record.content), f"written to {record.path}", sep="\n")
    return 0


def _what(module: Any) -> str:
    """A benchmark in a sentence: the head of its module's text."""
    return module.__doc__.split("\n")[0].partition(": ")[2].rstrip(".")


def _size(text: str) -> int:
    """An argparse type: a whole number that a tensor can have as a size."""
    if positive_int(text) > _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_LARGEST:,}")
    return int(text)


def _listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values between commas."""
    return lambda text: [one(word) for word in text.split(",")]


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    """An argparse type: one of these words."""

    def convert(text: str) -> str:
        if text not in choices:
            near = config_io.nearest(text, list(choices))
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}{near}")
        return text

    return convert
