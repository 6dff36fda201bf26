"""AdamW with parameter groups by role, and clipping of gradients."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sdd.optim_groups import param_groups
from sdd.train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `sdd.param_groups`, in torch's fused form."""
    groups = param_groups(model, config.weight_decay, config.alpha_weight_decay, config.embedding_weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


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
    sharded = [parameter for parameter in parameters if isinstance(parameter.grad, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, limit)
    whole = [parameter for parameter in parameters if not isinstance(parameter.grad, DTensor)]
    norms = [nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in (sharded, whole)]
    # the sharded sum of squares: full_tensor() adds up what the processes hold
    norm = torch.stack([part.full_tensor() if isinstance(part, DTensor) else part for part in norms]).norm()
    for part in (sharded, whole):  # torch's multi-tensor operations do not mix DTensors with plain tensors
        nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, `{"blocks.0.attn.q_proj.weight.exp_avg": ...}`.

    State that does not exist yet is created as zeros, as AdamW starts, so that a checkpoint can be read into it.
    Hyper-parameters are left out: they are a function of config and step.
    """
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state: dict[str, Any] = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
            found |= {f"{name}.{key}": value for key, value in state.items()}
    return found
