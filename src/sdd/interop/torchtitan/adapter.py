"""Checkpoints of a converted Llama 3 in the names of transformers and back, alphas and norms included.

torchtitan's own adapter for Llama 3 leaves out every name that it does not know, without a word.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

import re
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchtitan.models.common.rope import ComplexRoPE
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from sdd.errors import UserError
from sdd.interop.architecture import kind_of
from sdd.interop.ties import ties, to_ours
from sdd.interop.torchtitan.shape import model_config as shape_of
from sdd.models import LanguageModel, ModelConfig

T = TypeVar("T")
_MODEL_PARTS = {
    "embed.": "tok_embeddings.",
    "embed_norm.": "layers.0.embed_norm.",
    "final_norm.": "norm.",
    "head.": "lm_head.",
}
_BLOCK_PARTS = {
    "attn_in.": "attention_norm.",
    "attn_post.": "attention_post_norm.",
    "ffn_in.": "ffn_norm.",
    "ffn_post.": "ffn_post_norm.",
    "attn.ctx.": "attention.wo.before.",
    "attn.q_proj.": "attention.qkv_linear.wq.",
    "attn.k_proj.": "attention.qkv_linear.wk.",
    "attn.v_proj.": "attention.qkv_linear.wv.",
    "attn.o_proj.": "attention.wo.",
    "ffn.gate_proj.": "feed_forward.w1.",
    "ffn.up_proj.": "feed_forward.w3.",
    "ffn.down_proj.": "feed_forward.w2.",
}
_EMBEDDING, _HEAD, _THEIR_HEAD = "tok_embeddings.weight", "lm_head.weight", "lm_head.weight"


class SDDStateDictAdapter(StateDictAdapter):
    """Names and values of a converted Llama 3 for transformers, and back.

    The class there is that of `sdd export`: Llama, Qwen3 or OLMo 2 if they compute the placement, else
    `SDDForCausalLM`. A model of parts (pipeline parallel) gives its part.

    Args:
        model_config: an `SDDModel.Config`.
        hf_assets_path: as torchtitan's.

    Raises:
        UserError: on conversion, if a name belongs to nothing; the first is named.
    """

    def __init__(self, model_config: Any, hf_assets_path: str | None) -> None:
        super().__init__(model_config, hf_assets_path)
        self.tied = model_config.enable_weight_tying
        self.tensors = _tensors(shape_of(model_config))

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict for transformers, a tied head left out."""
        by_name = {tensor.ours: tensor for tensor in self.tensors}
        given = {name: value for name, value in state_dict.items() if not (self.tied and name == _HEAD)}
        if self.tied and self.fqn_to_index_mapping:
            self.fqn_to_index_mapping.pop(_THEIR_HEAD, None)
        parts: dict[str, list[Any]] = {}
        for name in sorted(given, key=lambda name: self.tensors.index(_found(name, by_name))):
            parts.setdefault(by_name[name].theirs, []).append(_to_theirs(given[name], by_name[name]))
        return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in parts.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict of the converted Llama 3, a tied head included."""
        self._validate_hf_rope_config(ComplexRoPE.Config)
        by_name: dict[str, list[_Tensor]] = {}
        for tensor in self.tensors:
            by_name.setdefault(tensor.theirs, []).append(tensor)
        given = {
            name: value
            for name, value in hf_state_dict.items()
            if not (self.tied and name == _THEIR_HEAD) and not name.endswith("rotary_emb.inv_freq")
        }
        ours = {
            tensor.ours: _to_ours(part, tensor)
            for name, value in given.items()
            for found in [_found(name, by_name)]
            for tensor, part in zip(found, value.chunk(len(found)) if len(found) > 1 else [value], strict=True)
        }
        if self.tied and _EMBEDDING in ours:
            ours[_HEAD] = ours[_EMBEDDING]
        return ours


def language_model(config: Any, state_dict: dict[str, Any]) -> LanguageModel:
    """The same model as one of ours, which generates, is evaluated and probed.

    Args:
        config: an `SDDModel.Config`.
        state_dict: of the model that it builds, whole tensors.

    Raises:
        UserError: if its RoPE is scaled, or a tensor is missing or belongs to nothing.
    """
    scaling = config.layers[0].attention.rope.scaling
    if scaling != "none":
        raise UserError(f"rope_scaling={scaling!r} is not known to a LanguageModel, whose text would be another")
    shape = shape_of(config)
    model = LanguageModel(shape)
    model.load_state_dict(to_ours(SDDStateDictAdapter(config, None).to_hf(state_dict), shape, kind_of(shape)))
    return model


class _Tensor(NamedTuple):
    """`theirs = factor * ours`, after the order of RoPE's pairs has been changed in each of some heads (or none).

    The scales of a norm over gate and up are halves of one of theirs.
    """

    ours: str
    theirs: str
    factor: float
    heads: int | None


def _tensors(shape: ModelConfig) -> list[_Tensor]:
    found = []
    for tie in ties(shape, kind_of(shape)):
        heads = None
        if rotated := re.search(r"attn\.([qk])_proj\.(weight|alpha)$", tie.ours):
            heads = shape.n_heads if rotated[1] == "q" else shape.n_kv_heads
            norm = _norm_at(shape, tie.ours, rotated[1])
            if rotated[2] == "alpha" and norm is not None and norm.shared_alpha:
                heads = 1
        found.append(_Tensor(_titan_name(tie.ours, shape), tie.theirs, tie.factor, heads))
    return found


def _norm_at(shape: ModelConfig, ours: str, site: Any) -> Any:
    """The norm at a site of the block that a name belongs to."""
    return shape.placement.layer(int(ours.split(".")[1]), shape.n_layers).get(site)


def _titan_name(ours: str, shape: ModelConfig) -> str:
    """Torchtitan's name of a parameter of a `LanguageModel`."""
    block = re.match(r"blocks\.(\d+)\.", ours)
    if block is None:
        part, _, leaf = ours.partition(".")
        return f"{_MODEL_PARTS[part + '.']}{leaf}"
    part, _, leaf = ours[block.end() :].rpartition(".")
    within = _BLOCK_PARTS[part + "."]
    if part.endswith("_proj"):
        norms = shape.placement.layer(int(block[1]), shape.n_layers)
        site = _SITES[part.rpartition(".")[2]]
        if site in norms or (site == "attn_out" and "ctx" in norms):
            within += "norm." if leaf == "alpha" else "linear."
    return f"layers.{block[1]}.{within}{leaf}"


_SITES: dict[str, Any] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "attn_out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "ffn_out",
}


def _found(name: str, known: dict[str, T]) -> T:
    if name not in known:
        raise UserError(f"{name} belongs to nothing in this placement: no tensor is left out in silence")
    return known[name]


def _to_theirs(value: Tensor, tensor: _Tensor) -> Tensor:
    value = value if tensor.factor == 1 else tensor.factor * value
    return value if tensor.heads is None else _swapped(value, tensor.heads, pairs_last=True)


def _to_ours(value: Tensor, tensor: _Tensor) -> Tensor:
    value = value if tensor.factor == 1 else value / tensor.factor
    return value if tensor.heads is None else _swapped(value, tensor.heads, pairs_last=False)


def _swapped(value: Tensor, heads: int, *, pairs_last: bool) -> Tensor:
    """Rows of each head from neighbours as pairs (torchtitan) to halves as pairs (transformers), or back."""
    half = len(value) // heads // 2
    split = (heads, half, 2) if pairs_last else (heads, 2, half)
    return value.view(*split, *value.shape[1:]).transpose(1, 2).reshape(value.shape).clone()
