"""A run converted in mid-course: SDD at some of its projections, everything else as it was.

The new run stands at the step of the old one's newest checkpoint. Matrices, their moments in the optimiser, the order
of the data and the random state are carried over; every new alpha is calibrated (see `sdd.conversion.calibrate`) on the
batches that come next, and its moments start at zero. The old run is only read.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.calibrate import Fit, Norms, fit_alphas
from sdd.conversion.match import matches
from sdd.errors import UserError, nearest
from sdd.files import finite, read_json_lines, write_aside
from sdd.models import ModelConfig
from sdd.norm_groups import resolve_group
from sdd.placement import PROJECTIONS, Norm, Placement, Site
from sdd.train import checkpoint as ckpt
from sdd.train import config_io
from sdd.train.config import RunConfig
from sdd.train.learner import Learner
from sdd.train.optim import optimizer_tensors
from sdd.train.parallel import ALONE
from sdd.train.run_dir import RunDir, environment

#: The projection at each site.
_NAMES: dict[Site, str] = {
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "attn_out": "attn.o_proj",
    "gate": "ffn.gate_proj",
    "up": "ffn.up_proj",
    "ffn_out": "ffn.down_proj",
}


@dataclass(frozen=True)
class ConvertedRun:
    """What `convert_run` did.

    Attributes:
        step: of the checkpoint that was converted.
        before: held-out loss in nats a token before the conversion.
        after: the same right after it.
        errors: by layer, the median error a token that calibration left; see `sdd.conversion.calibrate.Fit`.
        placement: of the new run.
    """

    step: int
    before: float
    after: float
    errors: dict[str, float]
    placement: str


def convert_run(
    run: Path,
    out: Path,
    choose: Callable[[ModelConfig], Placement],
    *,
    sequences: int = 16,
    say: Callable[[str], None] = print,
) -> ConvertedRun:
    """Write a run that goes on from the newest whole checkpoint of `run` with another placement.

    Args:
        run: the run directory; it is not changed.
        out: the new one.
        choose: the new placement for the run's model, see `with_layers` and `checked`.
        sequences: how many of the next training sequences to calibrate on.
        say: receives one line for each damaged checkpoint that is passed over.

    Raises:
        UserError: if there is no run or no whole checkpoint, if the placement does not fit, or `out` is not free.
    """
    if not (run / "config.json").exists():
        raise UserError(f"{run} holds no run (no config.json): name a run directory")
    RunDir(out).check_free()
    config = config_io.load(run / "config.json")
    new = replace(config, model=replace(config.model, placement=checked(config.model, choose(config.model))))
    old = Learner(replace(config, compile=False), ALONE)
    state = _load(run / "checkpoints", old, say)
    rng = torch.get_rng_state()
    before = old.evaluate()
    fits = _calibrate(old, new.model, state, sequences)
    learner = Learner(replace(new, compile=False), ALONE)
    _carry_over(old, learner, fits)
    after = learner.evaluate()
    errors = {name: fit.error for name, fit in fits.items()}
    done = ConvertedRun(state["step"], before.loss, after.loss, errors, new.model.placement.name or "own placement")
    torch.set_rng_state(rng)
    _write(run, out, new, learner, state, done, after.row())
    return done


def with_layers(model: ModelConfig, patterns: Sequence[str], heads: bool = False) -> Placement:
    """The model's placement with SDD at the projections that patterns name.

    Args:
        model: gives the placement and the layers, `blocks.0.attn.q_proj` for instance.
        patterns: globs of names or their endings, as in `sdd.convert`: "o_proj", "blocks.3.*".
        heads: norms per head on q, k and v.

    Raises:
        UserError: if a pattern fits no projection, or only such as have a norm.
    """
    layers: dict[str, tuple[int, Site]] = {
        f"blocks.{index}.{name}": (index, site) for index in range(model.n_layers) for site, name in _NAMES.items()
    }
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in layers):
            short = [name.rpartition(".")[2] for name in _NAMES.values()]
            raise UserError(f"--layers {pattern!r} fits no projection{nearest(pattern, short)}: {', '.join(short)}")
    new: dict[Site, list[int]] = {}
    for index, site in (place for name, place in layers.items() if matches(name, patterns)):
        if site not in model.placement.layer(index, model.n_layers):
            new.setdefault(site, []).append(index)
    if not new:
        raise UserError(f"--layers {','.join(patterns)}: all of these have a norm already")
    per_head = Norm(group="head")
    return _with_norms(model, {site: per_head if heads and site in "qkv" else Norm() for site in new}, new)


def _with_norms(model: ModelConfig, norms: Mapping[Site, Norm], blocks: Mapping[Site, Sequence[int]]) -> Placement:
    """The model's placement with these norms in these blocks."""
    old, everywhere = model.placement, dict(model.placement.norms)
    overrides: dict[int, dict[Site, Norm | None]] = {}
    for index, sites in sorted(old.overrides.items(), reverse=True):  # those counted from the end win
        overrides.setdefault(index % model.n_layers, {}).update(sites)
    for site, norm in norms.items():
        if len(blocks[site]) == model.n_layers:
            everywhere[site] = norm
            for sites in overrides.values():
                sites.pop(site, None)
            continue
        for index in blocks[site]:
            overrides.setdefault(index, {})[site] = norm
    name = f"{old.name or 'own'} + {', '.join(site for site in PROJECTIONS if site in norms)}"
    overrides = {index: sites for index, sites in sorted(overrides.items()) if sites}
    return replace(old, norms=everywhere, overrides=overrides, name=name, source="")


def checked(model: ModelConfig, new: Placement) -> Placement:
    """The placement, if it only adds norms to the projections of the model's own.

    Raises:
        UserError: otherwise: nothing else can be calibrated.
    """
    old, name = model.placement, new.name or "the placement"
    whole = ("residual", "weights", "scales")
    if differing := [field for field in whole if getattr(old, field) != getattr(new, field)]:
        raise UserError(
            f"{name} has another {differing[0]} than {old.name}: a conversion only adds norms to projections"
        )
    if new.joint_gate_up and not old.joint_gate_up:
        raise UserError(f"{name} has one norm over gate and up, which cannot be calibrated: choose another placement")
    new.check_depth(model.n_layers)
    pairs = [(old.norms, new.norms)]
    pairs += [(old.layer(i, model.n_layers), new.layer(i, model.n_layers)) for i in range(model.n_layers)]
    added: set[Site] = set()
    for before, now in pairs:
        for site in before.keys() | now.keys():
            if before.get(site) == now.get(site):
                continue
            if site not in PROJECTIONS or site in before or not now[site].scale:
                raise UserError(
                    f"{name} has another norm at {site} than {old.name or 'the run'}: a conversion only adds norms to "
                    "projections; choose them with --layers"
                )
            added.add(site)
    if not added:
        raise UserError(f"{name} adds no norm to a projection of {old.name or 'the run'}: nothing to convert")
    if model.moe is not None and added & {"gate", "up", "ffn_out"}:
        raise UserError("experts cannot be calibrated yet: choose among q_proj, k_proj, v_proj, o_proj")
    return new


def _load(folder: Path, learner: Learner, say: Callable[[str], None]) -> dict[str, Any]:
    """Read the newest whole checkpoint; nothing in the folder is changed."""
    for path in reversed(ckpt.list_checkpoints(folder)):
        try:
            return ckpt.load_checkpoint(path, learner.model, learner.optimizer)
        except ckpt.DamagedCheckpoint as error:
            say(f"passed over: {error}")
    raise UserError(f"{folder} has no whole checkpoint: nothing to convert")


def _calibrate(old: Learner, new: ModelConfig, state: dict[str, Any], sequences: int) -> dict[str, Fit]:
    linears, norms = {}, {}
    for index in range(new.n_layers):
        for site, norm in new.placement.layer(index, new.n_layers).items():
            name = f"blocks.{index}.{_NAMES[site]}" if site in _NAMES else ""
            layer = old.model.get_submodule(name) if name else None
            if isinstance(layer, nn.Linear):
                linears[name] = layer
                group = new.head_dim if norm.group == "head" else None
                norms[name] = Norms(resolve_group(group, layer.out_features), norm.eps, norm.shared_alpha)
    in_order = {name: linears[name] for name, _ in old.model.named_modules() if name in linears}
    with torch.autocast(old.device.type, old.autocast_dtype, enabled=old.autocast_dtype is not None):
        return fit_alphas(old.model, in_order, norms, _batches(old, state, sequences))


def _batches(old: Learner, state: dict[str, Any], sequences: int) -> list[Tensor]:
    """The next training sequences, four at a time."""
    old.loader.pass_over(state["skipped_batches"])
    found: list[Tensor] = []
    step = state["step"]
    while sum(map(len, found)) < sequences:
        found.append(old.loader.batch(step)[:, :-1])
        step += 1
    return list(torch.cat(found)[:sequences].to(old.device).split(4))


@torch.no_grad()
def _carry_over(old: Learner, new: Learner, fits: dict[str, Fit]) -> None:
    """Give the new model and optimiser what the old ones hold, and every new alpha its fit."""
    weights = dict(old.model.named_parameters())
    for name, parameter in new.model.named_parameters():
        fitted = name not in weights
        parameter.copy_(fits[name.removesuffix(".alpha")].alpha if fitted else weights[name])
    moments = optimizer_tensors(old.optimizer)
    for name, tensor in optimizer_tensors(new.optimizer).items():
        if name in moments:
            tensor.copy_(moments[name])


def _write(
    run: Path, out: Path, config: RunConfig, learner: Learner, state: dict[str, Any], done: ConvertedRun, row: Any
) -> None:
    """Write the new run aside, and give it its name when it is whole."""
    aside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "checkpoints").mkdir(parents=True)
        for name in ("metrics.jsonl", "probe.jsonl", "samples.jsonl"):
            if (run / name).exists():
                shutil.copyfile(run / name, aside / name)
        rows = list(read_json_lines(aside / "metrics.jsonl")) if (aside / "metrics.jsonl").exists() else []
        rows = [r for r in rows if r.get("step", 0) <= done.step]
        rows.append({"step": done.step, **row, "converted": done.placement, "time": time.time()})
        write_aside(aside / "metrics.jsonl", "".join(json.dumps(finite(r)) + "\n" for r in rows))
        write_aside(aside / "convert.json", json.dumps(finite({"from": str(run), **asdict(done)}), indent=2) + "\n")
        fresh = {
            "config": config_io.to_dict(config),
            "environment": environment(learner.device, learner.precision),
            "guard": {"losses": [], "norms": []},  # what was usual is so no longer
        }
        ckpt.save_checkpoint(aside / "checkpoints", learner.model, learner.optimizer, {**state, **fresh})
        config_io.save(config, aside / "config.json")
        aside.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
