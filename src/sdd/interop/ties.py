"""Which parameter of a `LanguageModel` is which of an exported model, and how one becomes the other.

A parameter is the other one times a number, but for three cases: the matrices of experts are stacked here and modules
of their own there; where gate and up have one norm, its weight is both alphas; and a learned scale of the logits is
part of the head's rows there.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sdd.errors import UserError
from sdd.interop.architecture import Kind
from sdd.models import LanguageModel, ModelConfig
from sdd.nn import ExpertLinear, LearnedScale, RMSNorm

_PARTS = {
    "embed": "model.embed_tokens",
    "embed_norm": "model.embed_norm",
    "final_norm": "model.norm",
    "head": "lm_head",
    "blocks": "model.layers",
    "attn_in": "attn_in_norm",
    "attn_post": "attn_post_norm",
    "ffn_in": "ffn_in_norm",
    "ffn_post": "ffn_post_norm",
    "attn": "self_attn",
    "ctx": "ctx_norm",
    "ffn": "mlp",
}
#: The names of norms in transformers' own classes, in place of ours.
_NATIVE_NAMES: Mapping[Kind, Mapping[str, str]] = {
    "sdd": {},
    "llama": {"attn_in_norm": "input_layernorm", "ffn_in_norm": "post_attention_layernorm"},
    "qwen3": {"attn_in_norm": "input_layernorm", "ffn_in_norm": "post_attention_layernorm"},
    "olmo2": {"self_attn.o_norm": "post_attention_layernorm", "mlp.down_norm": "post_feedforward_layernorm"},
}


class Tie(NamedTuple):
    """`theirs = factor * ours`: ties with one name of theirs are its parts, with one of ours its experts, in order."""

    ours: str
    theirs: str
    expert: int | None
    factor: float


def ties(config: ModelConfig, kind: Kind) -> list[Tie]:
    """The ties of all parameters but a learned scale of the logits."""
    model = LanguageModel(config, "meta")
    return [
        Tie(f"{name}.{leaf}", _theirs(name, leaf, expert, joint=_is_joint(model, name), kind=kind), expert, factor)
        for name, module in model.named_modules()
        if name != "logit_scale"
        for leaf in module._parameters
        if module._parameters[leaf] is not None
        for expert in (range(len(module.weight)) if isinstance(module, ExpertLinear) else [None])
        for factor in [_factor(module)]
    ]


def to_theirs(model: LanguageModel, kind: Kind) -> dict[str, Tensor]:
    """The state dict of the exported model, the head left out where it is the embedding."""
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found: dict[str, list[Tensor]] = {}
    for tie in ties(model.config, kind):
        value = ours[tie.ours] if tie.expert is None else ours[tie.ours][tie.expert]
        found.setdefault(tie.theirs, []).append(value if tie.factor == 1 else tie.factor * value)
    state = {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in found.items()}
    if model.logit_scale is not None:
        state["lm_head.weight"] = model.head_weight.detach()
    return state


def to_ours(theirs: Mapping[str, Tensor], config: ModelConfig, kind: Kind) -> dict[str, Tensor]:
    """The parameters of a `LanguageModel` from an exported state dict.

    Raises:
        UserError: if a tensor is missing, has another shape, or belongs to nothing here; the first is named.
    """
    shapes = {name: parameter.shape for name, parameter in LanguageModel(config, "meta").named_parameters()}
    state = dict(theirs)
    head = state.pop("lm_head.weight", None) if config.tie_embeddings else state.get("lm_head.weight")
    found: dict[str, list[Tensor]] = {}
    taken: dict[str, int] = {}  # rows of each tensor that have found their place
    for tie in ties(config, kind):
        if tie.theirs not in state:
            raise UserError(f"the weights lack {tie.theirs}")
        shape = shapes[tie.ours] if tie.expert is None else shapes[tie.ours][1:]
        start = taken.get(tie.theirs, 0)
        taken[tie.theirs] = start + shape[0]
        value = state[tie.theirs][start : start + shape[0]]
        if value.shape != shape:
            raise UserError(f"{tie.theirs} has shape {list(state[tie.theirs].shape)}: expected {list(shape)}")
        found.setdefault(tie.ours, []).append(value if tie.factor == 1 else value / tie.factor)
    for name, tensor in state.items():
        if taken.get(name) != len(tensor):
            raise UserError(f"{name} of shape {list(tensor.shape)} has no place in this model")
    ours = {name: torch.cat(values).view(shapes[name]) for name, values in found.items()}
    if "logits" in config.placement.scales:
        _split_head(ours, head, config)
    return ours


def _split_head(ours: dict[str, Tensor], head: Tensor | None, config: ModelConfig) -> None:
    """Take the learned scale of the logits out of the head: its rows' lengths, or their part over a tied embedding's.

    So a head of unit rows, which is what nGPT has, comes back as it was.
    """
    scale = LanguageModel(config, "meta").logit_scale
    if head is None or scale is None:
        raise UserError("the weights lack lm_head.weight")
    lengths = head.norm(dim=1)
    if config.tie_embeddings:
        lengths = lengths / ours["embed.weight"].norm(dim=1)
    else:
        ours["head.weight"] = head / lengths[:, None]
    ours["logit_scale.weight"] = lengths / _factor(scale)


def _is_joint(model: LanguageModel, name: str) -> bool:
    """Whether the alpha of this projection is part of a norm over gate and up."""
    network, _, role = name.rpartition(".")
    return role in ("gate_proj", "up_proj") and bool(getattr(model.get_submodule(network), "joint", False))


def _factor(module: torch.nn.Module) -> float:
    if isinstance(module, LearnedScale):
        return module.value / module.stored
    return module.factor if isinstance(module, RMSNorm) else 1.0


def _theirs(name: str, leaf: str, expert: int | None, *, joint: bool, kind: Kind) -> str:
    """The name of a parameter there."""
    parts = [_PARTS.get(part, part) for part in name.removesuffix(".rate").split(".")]
    if expert is not None:
        parts[-1:] = ["experts", str(expert), parts[-1]]
    if leaf == "alpha":
        parts[-1] = "gate_up_norm" if joint else parts[-1].replace("_proj", "_norm")
    joined = ".".join([*parts, "weight"])
    for own, native in _NATIVE_NAMES[kind].items():
        joined = joined.replace(own, native)
    return joined
