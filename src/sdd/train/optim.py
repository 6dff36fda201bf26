"""AdamW with groups by role, and its state as named tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from sdd.optim_groups import param_groups
from sdd.train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `sdd.param_groups`, in torch's fused form."""
    groups = param_groups(model, config.weight_decay, config.alpha_weight_decay, config.embedding_weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, `{"blocks.0.attn.q_proj.weight.exp_avg": ...}`.

    State that does not exist yet is made first (zeros, as AdamW starts), so that a checkpoint can be read into it.
    Hyper-parameters are not in it: they are a function of config and step.
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
