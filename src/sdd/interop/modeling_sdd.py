"""A decoder whose norms stand where its config says: SDD, Pre-Norm, Post-Norm, DeepNorm, nGPT and others.

    x = embed(E[tokens])
    x = attn_post(mix(x, o(ctx(attention(q(h), k(h), v(h))))))    h = attn_in(x)
    x = ffn_post(mix(x, down(silu(gate(h)) * up(h))))             h = ffn_in(x)
    logits = head(final(x))

Each of these sites may have a norm, `weight * z / sqrt(mean(z^2) + eps)`; that of a projection stands after its
`nn.Linear`, as a module of its own. Scale-Distribution Decoupling (arXiv 2502.15499) is such a norm with its weight
alpha. The statistic and the weight are applied in at least float32, before the cast back.

This file needs torch and transformers only. Exports of the package `sdd` hold a copy of it.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

# transformers 5.24 renamed `past_key_values` to `cache`. Before that, `cache` was that of continuous batching alone,
# which the attention function takes among its kwargs.
CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"


class SDDConfig(PreTrainedConfig):
    """The shape of the model and the place of each norm.

    Attributes:
        norms: by site, `{"group": "full" | "head", "shared": bool, "eps": float, "alpha": float | None}`; a site that
            is absent has no norm. alpha is the initial value of the norm's weight, None for a norm without one; shared
            is whether all heads have one weight.
        layer_norms: norms of single blocks, by index, in place of `norms`.
        joint_gate_up: gate and up have one norm over both vectors.
        residual: (c_x, c_f) of each sublayer's `c_x * x + c_f * f`, or one pair for all; None for the learned rule
            `x + |a| (f - x)`.
        scales: where learned scales without a norm stand: "qk", "gate", "up".
        num_experts: of a mixture of experts in each block; 0 for a dense model.
        shared_intermediate_size: hidden width of a network that every token uses beside its experts; 0 for none.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        tensor_parallel: how tensor parallelism cuts the model, by module of the base model, in transformers' words.
        sdd: the model's config in the package `sdd`, for the way back.
    """

    model_type = "sdd"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = property(lambda self: self.tensor_parallel)  # pyright: ignore[reportAssignmentType]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_norm": (["inputs_embeds"], ["hidden_states"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 4096
    hidden_size: int = 64
    intermediate_size: int = 176
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 128
    rope_parameters: dict | None = None
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    norms: dict | None = None
    layer_norms: dict | None = None
    joint_gate_up: bool = False
    residual: list | None = None
    scales: list | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 1
    shared_intermediate_size: int = 0
    norm_topk_prob: bool = False
    tensor_parallel: dict | None = None
    sdd: dict | None = None

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    def norms_of(self, layer: int) -> dict[str, dict[str, Any]]:
        """The norms of one block, by site."""
        return (self.layer_norms or {}).get(str(layer), self.norms or {})


class SDDRMSNorm(nn.Module):
    """`weight * z / sqrt(mean(z^2) + eps)` along the last dimension."""

    weight: nn.Parameter | None

    def __init__(self, width: int, eps: float, initial: float | None = 1.0) -> None:
        super().__init__()
        self.variance_epsilon, self.initial = eps, initial
        weight = None if initial is None else nn.Parameter(torch.full((width,), initial))
        self.register_parameter("weight", weight)

    def forward(self, z: Tensor) -> Tensor:
        y = z.to(torch.promote_types(z.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (y if self.weight is None else self.weight * y).to(z.dtype)


class SDDHeadNorm(SDDRMSNorm):
    """The same norm over each head; its weight is one for all heads, or has an element for each feature."""

    def __init__(self, head_dim: int, width: int, eps: float, initial: float | None = 1.0) -> None:
        super().__init__(width, eps, initial)
        self.head_dim = head_dim

    def forward(self, z: Tensor) -> Tensor:
        y = z.to(torch.promote_types(z.dtype, torch.float32)).unflatten(-1, (-1, self.head_dim))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (y if self.weight is None else self.weight.view(-1, self.head_dim) * y).flatten(-2).to(z.dtype)


class SDDScale(nn.Module):
    """A learned scale of each feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.initial = 1.0
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).to(x.dtype)


class SDDMix(nn.Module):
    """The residual rule `c_x * x + c_f * f`."""

    def __init__(self, c_x: float, c_f: float) -> None:
        super().__init__()
        self.c_x, self.c_f = c_x, c_f

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return (x if self.c_x == 1 else self.c_x * x) + (f if self.c_f == 1 else self.c_f * f)


class SDDLearnedMix(SDDScale):
    """The residual rule `x + |a| (f - x)`."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (x + self.weight.abs() * (f - x)).to(x.dtype)


def norm_at(norms: dict[str, dict[str, Any]], site: str, width: int, head_dim: int = 0) -> nn.Module:
    """The norm of a site; the identity where there is none."""
    norm = norms.get(site)
    if norm is None:
        return nn.Identity()
    if norm["group"] == "head":
        return SDDHeadNorm(head_dim, head_dim if norm["shared"] else width, norm["eps"], norm["alpha"])
    return SDDRMSNorm(width, norm["eps"], norm["alpha"])


def mix_at(config: SDDConfig, sublayer: int) -> nn.Module:
    """The residual rule of a sublayer, counted from 0."""
    if config.residual is None:
        return SDDLearnedMix(config.hidden_size)
    return SDDMix(*config.residual[sublayer % len(config.residual)])


def scale_at(config: SDDConfig, site: str, width: int) -> nn.Module:
    """The learned scale of a site; the identity where there is none."""
    return SDDScale(width) if site in (config.scales or ()) else nn.Identity()


def rope(position_ids: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles at these positions, float32 `[B, 1, T, head_dim]`."""
    exact = torch.float32 if position_ids.device.type == "mps" else torch.float64  # late positions need it
    pairs = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=exact)
    frequencies = config.rope_parameters["rope_theta"] ** (-pairs / config.head_dim)
    angles = (position_ids[:, None, :, None].to(exact) * frequencies).repeat(1, 1, 1, 2)
    return angles.cos().float(), angles.sin().float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, heads, T, head_dim]` by position."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out; returns `[B, T, heads, head_dim]` and the weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SDDAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: SDDConfig, layer_idx: int) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        kv_width, norms = config.num_key_value_heads * head_dim, config.norms_of(layer_idx)
        self.config, self.layer_idx, self.head_dim = config, layer_idx, head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.attention_dropout, self.is_causal = head_dim**-0.5, 0.0, True
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = norm_at(norms, "q", width, head_dim)
        self.k_norm = norm_at(norms, "k", kv_width, head_dim)
        self.v_norm = norm_at(norms, "v", kv_width, head_dim)
        self.ctx_norm = norm_at(norms, "ctx", width, head_dim)
        self.o_norm = norm_at(norms, "attn_out", width)
        self.qk_scale = SDDScale(width) if "qk" in (config.scales or ()) else None

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        q = self.q_norm(self.q_proj(hidden_states))
        k = self.k_norm(self.k_proj(hidden_states))
        v = self.v_norm(self.v_proj(hidden_states))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
        if self.qk_scale is not None:  # s on q and on k alike is s^2 on q
            q = (self.qk_scale.weight.view(-1, 1, self.head_dim).square() * q).to(q.dtype)
        if (cache := kwargs.pop(CACHE, None)) is not None:
            noted = {"kwargs": kwargs} if CACHE == "cache" else {}  # continuous batching leaves its indices there
            k, v = cache.update(k, v, self.layer_idx, **noted)
        chosen = self.config._attn_implementation or "eager"
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention)
        y, weights = attention(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_norm(self.o_proj(self.ctx_norm(y.reshape(*shape, -1).contiguous()))), weights


class SDDMLP(nn.Module):
    """SwiGLU: the feed-forward network of a block, or one expert of a mixture."""

    def __init__(self, config: SDDConfig, norms: dict[str, dict[str, Any]], hidden: int) -> None:
        super().__init__()
        width = config.hidden_size
        joint = config.joint_gate_up and {"gate", "up"} <= norms.keys()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.gate_up_norm = norm_at(norms, "gate", 2 * hidden) if joint else None
        self.gate_norm = nn.Identity() if joint else norm_at(norms, "gate", hidden)
        self.up_norm = nn.Identity() if joint else norm_at(norms, "up", hidden)
        self.down_norm = norm_at(norms, "ffn_out", width)
        self.gate_scale, self.up_scale = (scale_at(config, site, hidden) for site in ("gate", "up"))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.gate_up_norm is None:
            gate, up = self.gate_norm(gate), self.up_norm(up)
        else:
            gate, up = self.gate_up_norm(torch.cat([gate, up], -1)).chunk(2, -1)
        return self.down_norm(self.down_proj(F.silu(self.gate_scale(gate)) * self.up_scale(up)))


class SDDMoE(nn.Module):
    """A mixture of experts without dropped tokens. Each expert is a module of its own, so that its matrices are seen.

    They stand in a ModuleDict: serving engines put a fused kernel, which has no norms, in place of a list of experts.

    With `p = softmax(router x)`, the output is the sum of `p_e * expert_e(x)` over the experts of largest p.
    """

    def __init__(self, config: SDDConfig, norms: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        hidden, shared = config.intermediate_size, config.shared_intermediate_size
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleDict({str(e): SDDMLP(config, norms, hidden) for e in range(config.num_experts)})
        self.shared = SDDMLP(config, norms, shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        logits = self.router(x)
        weights, chosen = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).topk(self.top_k)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(x, dtype=weights.dtype)
        if torch.compiler.is_compiling():  # sizes must not depend on the data: each expert computes every token
            shares = torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, chosen, weights)
            for expert, share in zip(self.experts.values(), shares.unbind(-1), strict=True):
                total = total + share[:, None] * expert(x)
        else:
            for index in chosen.unique().tolist():
                token, place = (chosen == index).nonzero(as_tuple=True)
                total = total.index_add(0, token, weights[token, place, None] * self.experts[str(index)](x[token]))
        y = total.to(x.dtype)
        return (y if self.shared is None else y + self.shared(x)).view_as(hidden_states)


class SDDDecoderLayer(GradientCheckpointingLayer):
    """One block."""

    def __init__(self, config: SDDConfig, layer_idx: int) -> None:
        super().__init__()
        width, norms = config.hidden_size, config.norms_of(layer_idx)
        self.attn_in_norm = norm_at(norms, "attn_in", width)
        self.self_attn = SDDAttention(config, layer_idx)
        self.attn_mix = mix_at(config, 2 * layer_idx)
        self.attn_post_norm = norm_at(norms, "attn_post", width)
        self.ffn_in_norm = norm_at(norms, "ffn_in", width)
        self.mlp = SDDMoE(config, norms) if config.num_experts else SDDMLP(config, norms, config.intermediate_size)
        self.ffn_mix = mix_at(config, 2 * layer_idx + 1)
        self.ffn_post_norm = norm_at(norms, "ffn_post", width)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = hidden_states
        x = self.attn_post_norm(self.attn_mix(x, self.self_attn(self.attn_in_norm(x), **kwargs)[0]))
        return self.ffn_post_norm(self.ffn_mix(x, self.mlp(self.ffn_in_norm(x))))


def given_cache(past_key_values: Any, kwargs: dict[str, Any]) -> Any:
    """The keys and values so far, by either of their names; `kwargs` are without them then."""
    return kwargs.pop("cache", None) if past_key_values is None and CACHE == "cache" else past_key_values


class SDDPreTrainedModel(PreTrainedModel):
    """How transformers loads and draws the weights."""

    config_class = SDDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SDDDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _can_record_outputs = {"hidden_states": SDDDecoderLayer, "attentions": SDDAttention}
    _can_compile_fullgraph = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (SDDRMSNorm, SDDScale)) and module.weight is not None:
            init.constant_(module.weight, module.initial)  # pyright: ignore[reportArgumentType]


class SDDModel(SDDPreTrainedModel):
    """Embedding, blocks and the norm before the head."""

    def __init__(self, config: SDDConfig) -> None:
        super().__init__(config)
        norms = config.norms or {}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = norm_at(norms, "embed", config.hidden_size)
        self.layers = nn.ModuleList(SDDDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm_at(norms, "final", config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        caching = self.config.use_cache if use_cache is None else use_cache
        cache = given_cache(past_key_values, kwargs)
        if cache is None and isinstance(attention_mask, Tensor) and attention_mask.shape[-1] > x.shape[1]:
            raise ValueError("attention_mask has tokens that neither the inputs nor the cache hold: give the cache")
        if caching and cache is None and not (self.training and self.gradient_checkpointing):
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        known = {CACHE: cache, "position_ids": position_ids}
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask, **known)
        angles, x = rope(position_ids, self.config), self.embed_norm(x)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_embeddings=angles, **known, **kwargs)
        return BaseModelOutputWithPast(self.norm(x), cache if caching else None)


class SDDForCausalLM(SDDPreTrainedModel, GenerationMixin):
    """The language model: `SDDModel` and its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: SDDConfig) -> None:
        super().__init__(config)
        self.model = SDDModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        cache = given_cache(past_key_values, kwargs)
        out = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept, :])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, getattr(out, CACHE), out.hidden_states, out.attentions)
