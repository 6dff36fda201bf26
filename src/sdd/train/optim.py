"""The optimiser of a run: parameter groups by role, which rule moves which parameter, and clipping of gradients."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sdd.optim_groups import param_groups
from sdd.train.config import OptimConfig
from sdd.train.optimizers import Muon, StableAdamW, Together


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `config.name` names, over `sdd.param_groups`; AdamW in torch's fused form.

    "muon" is Muon for the matrices inside the blocks (see `moved_by_muon`) and AdamW for the rest.
    """
    groups = parameter_groups(model, config)
    adam: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "stable-adamw":
        return StableAdamW(groups, **adam)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    return Together(
        muon=Muon(_part(groups, of_muon=True), config.lr, config.momentum),
        adamw=torch.optim.AdamW(_part(groups, of_muon=False), **adam, fused=True),
    )


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The groups of `sdd.param_groups` with the weight decays of a config, and what multiplies a group's rate.

    A group has parameters of one mesh, see `by_mesh`.
    """
    decays = config.weight_decay, config.alpha_weight_decay, config.embedding_weight_decay, config.sdd_weight_decay
    groups = param_groups(model, *decays)
    for group in groups:
        if group["role"] == "alpha":
            group["lr_factor"] = config.alpha_lr
    return [part for group in groups for part in _by_mesh(group)]


def moved_by_muon(group: dict[str, Any], name: str) -> bool:
    """Whether Muon moves a parameter of a group: a matrix, or a stack of them, inside a block and not its router.

    Each row of embedding, head and router stands for one token or expert. They are not matrices of one map whose
    singular values should be alike, and practice leaves them to AdamW.
    """
    return group["role"] in ("matrix", "sdd") and name.startswith("blocks.") and not name.endswith("router.weight")


def _part(groups: list[dict[str, Any]], *, of_muon: bool) -> list[dict[str, Any]]:
    """The groups with only the parameters that Muon moves, or only the others; empty ones are left out."""
    kept = (
        _with(group, [name for name in group["names"] if moved_by_muon(group, name) == of_muon]) for group in groups
    )
    return [group for group in kept if group["params"]]


def _by_mesh(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One group for each mesh that the parameters of a group are spread over."""
    names = dict(zip(group["params"], group["names"], strict=True))
    for part in by_mesh(group["params"]).values():
        yield _with(group, [names[parameter] for parameter in part])


def _with(group: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The group with only the parameters of these names."""
    params = dict(zip(group["names"], group["params"], strict=True))
    return {**group, "names": names, "params": [params[name] for name in names]}


def describe(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """One line on the optimiser, if it is another than AdamW."""
    if isinstance(optimizer, StableAdamW):
        yield "StableAdamW: updates clipped tensor by tensor"
    if isinstance(optimizer, Together):
        moved = [p for group in optimizer.param_groups if group["rule"] == "muon" for p in group["params"]]
        stacks = ", experts matrix by matrix" if any(p.ndim > 2 for p in moved) else ""
        yield (
            f"Muon for {sum(p.numel() for p in moved):,} parameters, the matrices of the blocks{stacks}; AdamW for the "
            "rest"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate, times the group's own factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit`.

    Args:
        model: its gradients are scaled in place. Of a sharded model, each process holds a part.
        limit: 0 leaves the gradients as they are.

    Returns:
        The norm before scaling. It is the same on every process.
    """
    limit = limit or math.inf
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    kinds = by_mesh(parameters)
    if all(mesh is None for mesh in kinds):
        return nn.utils.clip_grad_norm_(parameters, limit)
    norms = [nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in kinds.values()]
    # the sharded sum of squares: full_tensor() adds up what the processes hold, copies of a part once
    norm = torch.stack([part.full_tensor() if isinstance(part, DTensor) else part for part in norms]).norm()
    for part in kinds.values():
        nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm


def by_mesh(parameters: Iterable[Tensor]) -> dict[DeviceMesh | None, list[Tensor]]:
    """Parameters by the mesh that they are spread over, None for plain ones.

    Torch's operations on many tensors at once take those of one mesh.
    """
    kinds: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return kinds


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, `{"blocks.0.attn.q_proj.weight.exp_avg": ...}`.

    State that does not exist yet is created as zeros, as every optimiser starts, so that a checkpoint can be read into
    it. Hyper-parameters are left out: they are a function of config and step.
    """
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = _start(optimizer, group, parameter)
            found |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return found


def _start(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before the first step."""
    rule = optimizer.parts[group["rule"]] if isinstance(optimizer, Together) else optimizer
    if isinstance(rule, StableAdamW | Muon):
        return rule.start(parameter)
    moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}
