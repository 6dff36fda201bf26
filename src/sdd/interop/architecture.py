"""A model's config in transformers' words: the native classes where the function is theirs, else `SDDConfig`.

Native are the placements that others have classes for, whatever their names: norms before the sublayers (Llama), the
same with a norm on each head of q and k (Qwen3), and OLMo 2's. All their norms have a scale and one eps, the residual
rule is `x + f`, and the model is dense.
"""

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Literal

from sdd.errors import UserError
from sdd.models import ModelConfig
from sdd.models.init import init_std
from sdd.placement import (
    DEPTH_FACTORS,
    LEARNED_RESIDUAL,
    MODEL_SITES,
    RESIDUALS,
    Norm,
    Placement,
    placements,
)

Kind = Literal["llama", "qwen3", "olmo2", "sdd"]
#: Of each kind the class of its model in transformers, or here.
CLASSES: Mapping[Kind, str] = MappingProxyType(
    {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "sdd": "SDDForCausalLM"}
)
#: The placement that each native class computes, but for eps and initial values.
NATIVE: Mapping[Kind, Placement] = MappingProxyType(
    {"llama": placements["prenorm"], "qwen3": placements["prenorm-qk"], "olmo2": placements["olmo2"]}
)
# What `sdd.interop.modeling_sdd` computes: written out, so that what is added to `sdd.placement` is refused at first.
_KNOWN_SCALES = ("qk", "gate", "up", "mix", "logits")
_KNOWN_SITES = (
    *("embed", "attn_in", "q", "k", "v", "ctx", "attn_out", "attn_post"),
    *("ffn_in", "gate", "up", "ffn_out", "ffn_post", "final"),
)


def kind_of(config: ModelConfig) -> Kind:
    """The class of transformers that computes this model, or "sdd" where none does.

    Raises:
        UserError: if the model's norms are not computed in float32.
    """
    if config.statistics != "float32":
        raise UserError(
            f"model.statistics={config.statistics} is for studies, and exported classes compute norms in float32: "
            "export a run with model.statistics=float32"
        )
    placement, layers = config.placement, range(config.n_layers)
    plain = placement.residual == "x + f" and not placement.scales and placement.weights == "free"
    if not plain or config.moe is not None or len({norm.eps for norm in placement.norms.values()}) != 1:
        return "sdd"
    found = {site: _form(norm) for site, norm in placement.norms.items()}
    blocks = {site: norm for site, norm in placement.norms.items() if site not in MODEL_SITES}
    if any(placement.named_layer(index, config.n_layers) != blocks for index in layers):
        return "sdd"
    forms: dict[Kind, Any] = {
        kind: {site: _form(norm) for site, norm in native.norms.items()} for kind, native in NATIVE.items()
    }
    fitting: list[Kind] = [kind for kind, form in forms.items() if form == found]
    return fitting[0] if fitting else "sdd"


def _form(norm: Norm) -> tuple[Any, ...]:
    """What the class fixes; initial values and eps are not part of it."""
    return norm.group, norm.shared_alpha, norm.scale, norm.depth_factor


def shared_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields that every class has."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_scale * init_std(config, "q_proj", config.d_model, config.d_model),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
    }


def native_fields(config: ModelConfig, kind: Kind) -> dict[str, Any]:
    """The fields of a native config."""
    eps = next(iter(config.placement.norms.values())).eps
    head = {} if kind == "olmo2" else {"head_dim": config.head_dim}
    return {**shared_fields(config), **head, "rms_norm_eps": eps}


def own_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of an `SDDConfig`: every rule as numbers, so that its file needs no names of ours.

    Raises:
        UserError: if the placement has something that the exported class does not know.
    """
    placement = config.placement
    _check_known(placement)
    blocks = [
        {site: described(norm, config, index + 1) for site, norm in placement.layer(index, config.n_layers).items()}
        for index in range(config.n_layers)
    ]
    ends = {site: described(placement.norms[site], config) for site in ("embed", "final") if site in placement.norms}
    experts = {}
    if config.moe is not None:
        experts = {
            "num_experts": config.moe.n_experts,
            "num_experts_per_tok": config.moe.top_k,
            "shared_intermediate_size": config.moe.d_shared,
            "norm_topk_prob": config.moe.renormalise,
        }
    tied = config.tie_embeddings and "logits" not in placement.scales
    return {
        **shared_fields(config),
        "tie_word_embeddings": tied,
        "norms": {**ends, **blocks[-1]},
        "layer_norms": {str(index): norms for index, norms in enumerate(blocks) if norms != blocks[-1]},
        "joint_gate_up": placement.joint_gate_up,
        "residual": _residual(config),
        "scales": [site for site in ("qk", "gate", "up") if site in placement.scales],
        **experts,
        "tensor_parallel": _plan(config, blocks),
        "sdd": asdict(config),
    }


def described(norm: Norm, config: ModelConfig, layer: int = 1) -> dict[str, Any]:
    """A norm as numbers; a factor by depth is part of the exported weight."""
    alpha = DEPTH_FACTORS[norm.depth_factor](layer) * norm.alpha(config.n_layers) if norm.scale else None
    return {"group": norm.group, "shared": norm.shared_alpha, "eps": norm.eps, "alpha": alpha}


def _plan(config: ModelConfig, blocks: list[dict[str, dict[str, Any]]]) -> dict[str, str]:
    """How transformers cuts the matrices over processes, by module.

    Each process keeps the heads or hidden features that it computes, if no norm or scale needs more than a head. Else
    all are gathered before the norms, and every process goes on with all of them.
    """
    placement = config.placement
    norms = [(site, block[site]) for block in blocks for site in ("q", "k", "v", "ctx") if site in block]
    # a weight for each feature would have to be cut as well
    apart = all(norm["group"] == "head" and (norm["shared"] or norm["alpha"] is None) for _, norm in norms)
    apart = apart and "qk" not in placement.scales
    plan = _cut("layers.*.self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", apart)
    if apart:  # each process has the gradient of its own heads
        weighted = {site for site, norm in norms if norm["alpha"] is not None}
        plan |= {f"layers.*.self_attn.{site}_norm": "replicated_with_grad_allreduce" for site in sorted(weighted)}
    apart = not any(site in block for block in blocks for site in ("gate", "up"))
    apart = apart and not {"gate", "up"} & set(placement.scales)
    networks = ["layers.*.mlp"]
    if config.moe is not None:
        networks = ["layers.*.mlp.experts.*", *["layers.*.mlp.shared"] * (config.moe.d_shared > 0)]
    for network in networks:
        plan |= _cut(network, ("gate_proj", "up_proj"), "down_proj", apart)
    return plan


def _cut(parent: str, rows: tuple[str, ...], columns: str, apart: bool) -> dict[str, str]:
    """The plan of matrices cut by rows, and of the one after them, cut by columns."""
    first, second = ("colwise", "rowwise") if apart else ("colwise_gather_output", "rowwise_split_input")
    return {**{f"{parent}.{name}": first for name in rows}, f"{parent}.{columns}": second}


def _residual(config: ModelConfig) -> list[list[float]] | None:
    if config.placement.residual == LEARNED_RESIDUAL:
        return None
    rule = RESIDUALS[config.placement.residual]
    pairs = [list(rule(sublayer, config.n_layers)) for sublayer in range(1, 2 * config.n_layers + 1)]
    return pairs if any(pair != pairs[0] for pair in pairs) else pairs[:1]


def _check_known(placement: Placement) -> None:
    name = placement.name or "own placement"
    norms = [item for sites in (placement.norms, *placement.overrides.values()) for item in sites.items()]
    strange = [f"a learned scale at {site}" for site in placement.scales if site not in _KNOWN_SCALES]
    strange += [f"a norm at {site}" for site, _ in norms if site not in _KNOWN_SITES]
    strange += [
        f"a factor by depth without a scale at {site}"
        for site, norm in norms
        if norm is not None and not norm.scale and norm.depth_factor != "one"
    ]
    if strange:
        raise UserError(f"{name} has {strange[0]}, which the exported class does not know: it cannot be exported")
