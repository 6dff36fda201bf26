"""Compare the losses of short runs with those of another revision: a change of form must not change them.

    ./dev bench compare_losses REVISION [--dtype float32|float64] [--path composed|recompute] [--steps N] [NAME ...]

Trains `nano` with every placement, and `moe-nano`, for 20 steps on drawn tokens, on a CPU with one thread: once with
the code in this checkout, once with that of a git revision. Prints whether the losses are equal bit for bit, and else
their largest relative difference. Exits with 1 if one is above 1e-12 in float64, or 1e-3 in float32, where a difference
of rounding grows from step to step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
LIMITS = {"float64": 1e-12, "float32": 1e-3}


def losses(name: str, dtype: str, path: str, steps: int) -> list[float]:
    """The losses of a run: `PLACEMENT` of nano, or `moe:PLACEMENT` of moe-nano."""
    from dataclasses import replace

    import torch

    import sdd
    from sdd import kernels
    from sdd.models import LanguageModel, model_presets
    from sdd.placement import placements

    torch.set_num_threads(1)
    torch.manual_seed(0)
    preset, _, placement = name.rpartition(":")
    config = replace(model_presets["moe-nano" if preset else "nano"], placement=placements[placement])
    model = LanguageModel(config).to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(sdd.param_groups(model), lr=4e-3)
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        tokens = torch.randint(0, config.vocab_size, (2, 65), generator=generator)
        with kernels.use(path):  # pyright: ignore[reportArgumentType]
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def run(source: Path, names: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """The losses by name, computed in a process of its own with the package in `source`."""
    command = [sys.executable, __file__, "--child", "--dtype", options.dtype, "--path", options.path]
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    done = subprocess.run(
        [*command, "--steps", str(options.steps), "here", *names], env=environment, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def compare(options: argparse.Namespace) -> int:
    """Run both revisions and print a line a run; the exit code."""
    from sdd.placement import placements

    names = options.names or [*placements, "moe:sdd", "moe:sdd-paper", "moe:sdd-released", "moe:prenorm-qk"]
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", "-q", other, options.revision], check=True)
        try:
            mine, theirs = (run(source, names, options) for source in (HERE, other))
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", other], check=True)
    worst = 0.0
    for name in names:
        pairs = list(zip(mine[name], theirs[name], strict=True))
        difference = max(abs(one - two) / abs(two) for one, two in pairs)
        worst = max(worst, difference)
        equal = all(one == two for one, two in pairs)
        print(f"{name:20} {'equal bit for bit' if equal else f'largest relative difference {difference:.1e}'}")
    return int(not worst <= LIMITS[options.dtype])


def main() -> int:
    """Compare, or as a child process print the losses of the package that is imported."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("revision", help="of git: a commit, a branch or a tag")
    parser.add_argument("names", nargs="*", help="placements, those of moe-nano as moe:PLACEMENT (default: all)")
    parser.add_argument("--dtype", choices=sorted(LIMITS), default="float32")
    parser.add_argument("--path", choices=["composed", "recompute"], default="composed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if not options.child:
        return compare(options)
    print(json.dumps({name: losses(name, options.dtype, options.path, options.steps) for name in options.names}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
