"""Optimiser groups by role: which parameters weight decay reaches."""

from typing import Any, Literal

from torch import nn

from sdd.nn import SDDExpertLinear, SDDLinear

Role = Literal["matrix", "embedding", "alpha", "bias"]


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.1,
    alpha_weight_decay: float = 0.0,
    embedding_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups by role, as an argument of `torch.optim.AdamW`.

    | role      | parameters                                                          | decay                  |
    |-----------|---------------------------------------------------------------------|------------------------|
    | matrix    | two or more dimensions: V, W, convolutions, positions               | weight_decay           |
    | embedding | the weight of an `nn.Embedding`, a head tied to it included         | embedding_weight_decay |
    | alpha     | alpha of an SDD layer; a 1-D weight of a class named `...norm...`   | alpha_weight_decay     |
    | bias      | everything else                                                     | 0                      |

    Decay on V acts on the learning rate only (the forward pass does not see its scale); decay on alpha and on the
    scales of output norms shrinks what a layer says, which arXiv 2605.26895 finds harmful.

    Args:
        model: any module.
        weight_decay: of the matrices.
        alpha_weight_decay: of alpha and of the norms' scales.
        embedding_weight_decay: of the embeddings.

    Returns:
        One dict `{"params", "weight_decay", "role", "names"}` for each role that has trainable parameters, in the
        order of the table, parameters in the model's order. A shared parameter stands once, by its first name.
    """
    decay: dict[Role, float] = {
        "matrix": weight_decay,
        "embedding": embedding_weight_decay,
        "alpha": alpha_weight_decay,
        "bias": 0.0,
    }
    roles = _special_roles(model)
    members: dict[Role, list[tuple[str, nn.Parameter]]] = {role: [] for role in decay}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = roles.get(parameter, "matrix" if parameter.ndim > 1 else "bias")
            members[role].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in named],
            "weight_decay": decay[role],
            "role": role,
            "names": [name for name, _ in named],
        }
        for role, named in members.items()
        if named
    ]


def _special_roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """The parameters whose role their owner decides."""
    roles: dict[nn.Parameter, Role] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, (SDDLinear, SDDExpertLinear)):
            roles[module.alpha] = "alpha"
        elif weight is None:
            continue
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            roles[weight] = "embedding"
        elif "norm" in type(module).__name__.lower() and weight.ndim == 1:
            roles[weight] = "alpha"
    return roles
