"""Optimiser groups by role, so that weight decay reaches the right parameters."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from sdd.nn import LearnedScale, SDDExpertLinear, SDDLinear

Role = Literal["matrix", "sdd", "embedding", "alpha", "bias"]


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.1,
    alpha_weight_decay: float = 0.0,
    embedding_weight_decay: float = 0.0,
    sdd_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters by role, as an argument for `torch.optim.AdamW`.

    | role      | parameters                                                          | decay                  |
    |-----------|---------------------------------------------------------------------|------------------------|
    | matrix    | two or more dimensions: V, W, convolutions, positions               | weight_decay           |
    | sdd       | V of an SDD layer, if sdd_weight_decay is given; else V is a matrix | sdd_weight_decay       |
    | embedding | the weight of an `nn.Embedding`, a head tied to it included         | embedding_weight_decay |
    | alpha     | alpha of an SDD layer; a 1-D weight of a class named `...norm...`;  | alpha_weight_decay     |
    |           | a learned scale without a norm                                      |                        |
    | bias      | everything else                                                     | 0                      |

    Decay on V changes the effective learning rate only, because the forward pass does not see the scale of V. Decay on
    alpha and on the scales of output norms shrinks the output itself, which arXiv 2605.26895 finds harmful.

    Args:
        model: any module.
        weight_decay: of the matrices.
        alpha_weight_decay: of alpha and of the norms' scales.
        embedding_weight_decay: of the embeddings.
        sdd_weight_decay: of V in SDD layers; None for weight_decay.

    Returns:
        One dict `{"params", "weight_decay", "role", "names"}` for each role that has trainable parameters, in the
        order of the table, with the parameters in the model's order. A shared parameter appears once, by its first
        name.
    """
    decay = {
        "matrix": weight_decay,
        "sdd": sdd_weight_decay,
        "embedding": embedding_weight_decay,
        "alpha": alpha_weight_decay,
        "bias": 0.0,
    }
    groups = {role: {"params": [], "weight_decay": value, "role": role, "names": []} for role, value in decay.items()}
    roles = _roles_by_owner(model, "matrix" if sdd_weight_decay is None else "sdd")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[roles.get(parameter, "matrix" if parameter.ndim > 1 else "bias")]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def warn_if_decayed(model: nn.Module, optimizer: Any) -> list[str]:
    """Warn, in one line, if an optimiser decays the alpha of an SDD layer; `param_groups` gives groups that do not.

    Args:
        model: any module.
        optimizer: a `torch.optim.Optimizer` over its parameters, or a wrapper that has `param_groups`.

    Returns:
        The names of the alphas that are decayed, in the model's order.
    """
    groups = [group for group in optimizer.param_groups if group.get("weight_decay")]
    decayed = {parameter for group in groups for parameter in group["params"]}
    alphas = set(alphas_of(model))
    names = [name for name, parameter in model.named_parameters() if parameter in alphas & decayed]
    if names:
        warnings.warn(
            f"the optimiser decays {len(names)} alphas of SDD layers, such as {names[0]}, which shrinks the layers' "
            "outputs: build it from sdd.param_groups(model)",
            stacklevel=2,
        )
    return names


def alphas_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """The alphas of a model's SDD layers and experts, as far as they are learned; not the scales of other norms."""
    for module in model.modules():
        own = ("alpha",) if isinstance(module, (SDDLinear, SDDExpertLinear)) else ()
        for name in own or getattr(module, "alpha_names", ()):  # experts of a converted model
            alpha = module._parameters.get(name)  # a buffer, if it is not learned
            if alpha is not None:
                yield alpha


def _roles_by_owner(model: nn.Module, sdd: Role) -> dict[nn.Parameter, Role]:
    """The role of each parameter whose module decides it, whatever the parameter's shape.

    Args:
        model: any module.
        sdd: the role of V.
    """
    roles: dict[nn.Parameter, Role] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, (SDDLinear, SDDExpertLinear)):
            alpha = module._parameters.get("alpha")  # a buffer, if it is not learned
            if alpha is not None:
                roles[alpha] = "alpha"
            if weight is not None:
                roles.setdefault(weight, sdd)  # shared with an embedding it is the embedding's
        elif names := getattr(module, "alpha_names", ()):  # experts of a converted model
            for name in names:
                roles[module.get_parameter(name)] = "alpha"
                roles[module.get_parameter(name.removesuffix("_alpha"))] = sdd
        elif isinstance(module, LearnedScale):
            roles[module.weight] = "alpha"
        elif weight is None:
            continue
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            roles[weight] = "embedding"
        elif "norm" in type(module).__name__.lower() and weight.ndim == 1:
            roles[weight] = "alpha"
    return roles
