"""Descriptions of presets and placements, for `sdd presets`."""

from collections.abc import Collection, Sequence

from sdd.models.config import ModelConfig
from sdd.models.elimination import left_out_norms
from sdd.models.flops import training_flops
from sdd.models.init import init_std
from sdd.models.presets import count_parameters, model_presets
from sdd.placement import (
    LEARNED_RESIDUAL,
    MODEL_SITES,
    PROJECTIONS,
    RESIDUALS,
    SITES,
    SUBLAYER_SCALES,
    WIDTHS,
    Norm,
    Placement,
    Site,
    placements,
)
from sdd.terminal import aligned, indented


def list_presets() -> str:
    """Two tables: the presets with shape and parameters, the placements with their sites and source."""
    presets = [
        (
            name,
            config.n_layers,
            config.d_model,
            config.d_ff,
            "" if config.moe is None else f"{config.moe.n_experts}/{config.moe.top_k}",
            f"{config.n_heads}/{config.n_kv_heads}",
            f"{config.vocab_size:,}",
            config.context,
            "tied" if config.tie_embeddings else "untied",
            "" if config.moe is None else f"{count_parameters(config).published_active:,}",
            f"{count_parameters(config).published:,}",
        )
        for name, config in model_presets.items()
    ]
    heading = ("preset", "layers", "d_model", "d_ff", "experts/k", "heads/kv", "vocabulary", "context", "embeddings")
    heading = (*heading, "active", "parameters")
    methods: list[tuple[str, str]] = []
    for name, placement in placements.items():
        methods += [(name, _sites(placement)), ("", placement.source)]
    return "\n".join(
        [
            *aligned([heading, *presets], right=(1, 2, 3, 4, 5, 6, 7, 9, 10)),
            "",
            "Parameters: matrices and embeddings, a tied one once; without norms and alphas, as published labels count",
            "them. --printed-shape gives 581m to 2b the 8 kv heads and 100,278 tokens that their table prints. d_ff is",
            "that of one expert; active parameters are those that a token uses (588M leaves the routers out).",
            "",
            *aligned([("placement", "norms at, and source"), *methods]),
            "",
            f"A norm at {', '.join(PROJECTIONS)} makes that projection an SDD layer; :h is per head.",
            "One in full: sdd presets PRESET --placement NAME",
        ]
    )


def show_preset(name: str, config: ModelConfig) -> str:
    """One preset with one placement: shape, parameters, FLOPs, init and residual rule, and the norm of every site."""
    placement = config.placement
    sections = [
        [f"{name} with {placement.name or 'own placement'}", *([placement.source] if placement.source else [])],
        ["Shape", *indented(_shape(config))],
        ["Parameters", *indented(_parameters(config))],
        [f"FLOPs of training a token, at a context of {config.context}", *indented(_flops(config))],
        [f"Init rule {placement.init_words}, times init_scale {config.init_scale:g}", *indented(_stds(config))],
        ["Residual stream", f"  {_residual(config)}"],
        *([["Learned scales without a norm", *indented(_scales(config))]] if placement.scales else []),
        *([["Weights", f"  {_UNIT}"]] if placement.weights == "unit" else []),
        *_norm_sections(config),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _shape(config: ModelConfig) -> list[str]:
    return aligned(
        [
            ("blocks", config.n_layers),
            ("d_model", config.d_model),
            *_feed_forward(config),
            ("heads", f"{config.n_heads} of {config.head_dim}, {config.n_kv_heads} for keys and values"),
            ("vocabulary", f"{config.vocab_size:,}"),
            ("context", f"{config.context:,}"),
            ("rope theta", f"{config.rope_theta:,.0f}"),
        ]
    )


def _feed_forward(config: ModelConfig) -> list[tuple[str, object]]:
    moe = config.moe
    if moe is None:
        return [("d_ff", config.d_ff)]
    shared = [("shared expert", f"d_ff {moe.d_shared}")] if moe.d_shared else []
    weights = ", weights renormalised" if moe.renormalise else ""
    return [
        ("experts", f"{moe.n_experts} a block, d_ff {config.d_ff}; {moe.top_k} a token{weights}"),
        *shared,
        ("auxiliary losses", f"load balancing {moe.balance_loss:g}, router z-loss {moe.router_z_loss:g}"),
    ]


def _parameters(config: ModelConfig) -> list[str]:
    count = count_parameters(config)
    rows = [
        ("matrices in the blocks", f"{count.matrices:,}", ""),
        ("embedding", f"{count.embedding:,}", "also the head" if config.tie_embeddings else ""),
        ("head", f"{count.head:,}", "tied to the embedding" if config.tie_embeddings else ""),
        ("norms and alphas", f"{count.scales:,}", ""),
        ("all", f"{count.total:,}", ""),
        ("as published labels count", f"{count.published:,}", "without norms and alphas"),
    ]
    if config.moe is not None:
        rows += [
            ("active a token", f"{count.active:,}", f"{config.moe.top_k} of {config.moe.n_experts} experts a block"),
            ("  as published labels count", f"{count.published_active:,}", "without norms and alphas"),
            ("  and without routers", f"{count.published_active - count.routers:,}", ""),
        ]
    return aligned(rows, right=(1,))


def _flops(config: ModelConfig) -> list[str]:
    flops = training_flops(config)
    rows = [
        (
            "matrix products",
            f"{flops.matmul:,}",
            f"6 * {flops.matmul_parameters:,} active parameters: blocks and head, no look-up of embeddings",
        ),
        ("attention", f"{flops.attention:,}", "12 * blocks * d_model * context: the causal half not subtracted"),
        ("together", f"{flops.model:,}", "norms not counted"),
    ]
    return aligned(rows, right=(1,))


def _stds(config: ModelConfig) -> list[str]:
    C, F, KV = config.d_model, config.d_ff, config.kv_width
    shapes = {
        "embed": (config.vocab_size, C),
        "q_proj": (C, C),
        "k_proj": (C, KV),
        "v_proj": (C, KV),
        "o_proj": (C, C),
        "gate_proj": (C, F),
        "up_proj": (C, F),
        "down_proj": (F, C),
        **({} if config.moe is None else {"router": (C, config.moe.n_experts)}),
        "head": (C, config.vocab_size),
    }
    stds = {role: config.init_scale * init_std(config, role, *shape) for role, shape in shapes.items()}
    if config.tie_embeddings:
        del stds["head"]
    return aligned([(role, f"std {std:.4g}") for role, std in stds.items()])


def _residual(config: ModelConfig) -> str:
    """The residual rule, with the factors of the first and last sublayer if they are not 1."""
    name, L = config.placement.residual, config.n_layers
    if name == LEARNED_RESIDUAL:
        return f"{name}, a learned for each feature"
    ends = [RESIDUALS[name](k, L) for k in (1, 2 * L)]
    if ends[0] == ends[1]:
        return name if ends[0] == (1, 1) else f"{name}, i.e. {ends[0][0]:.4g} x + {ends[0][1]:.4g} f"
    return f"{name}: {ends[0][0]:.4g} x + {ends[0][1]:.4g} f at first, {ends[1][0]:.4g} x + {ends[1][1]:.4g} f at last"


_UNIT = "rows, of attn_out and ffn_out columns, are unit vectors, at first and after every step; no weight decay"


def _scales(config: ModelConfig) -> list[str]:
    about = {"qk": "q and k, after RoPE", "mix": "a of the residual rule"}
    rows: list[Sequence[object]] = [("of", "at first", "the parameter at first")]
    for site, scale in config.placement.scales.items():
        value, stored = scale.value(config.d_model), WIDTHS[scale.stored](config.d_model)
        rows.append((about.get(site, site), f"{value:.4g}", f"{stored:.4g}"))
    return aligned(rows)


def _norm_sections(config: ModelConfig) -> list[list[str]]:
    """One table for the sites that stand once, one for each kind of block."""
    once: dict[Site, Norm] = {site: norm for site, norm in config.placement.norms.items() if site in MODEL_SITES}
    layers = [config.placement.named_layer(index, config.n_layers) for index in range(config.n_layers)]
    sections = [["Norms that stand once", *indented(_norms(once, config, MODEL_SITES))]]
    done: list[dict[Site, Norm]] = []
    for norms in layers:
        if norms not in done:
            done.append(norms)
            which = [str(index) for index, other in enumerate(layers) if other == norms]
            title = "Norms in every block" if len(which) == len(layers) else f"Norms in block {', '.join(which)}"
            sites: list[Site] = [site for site in SITES if site not in MODEL_SITES]
            left_out = left_out_norms(config, layers.index(norms))
            note = ["left out where the fused kernels run: its readers cancel it; see model.eliminate_norms"]
            rows = [*_norms(norms, config, sites, left_out), *(note if left_out else [])]
            sections.append([title, *indented(rows)])
    return sections


def _norms(
    norms: dict[Site, Norm], config: ModelConfig, sites: Collection[Site], left_out: Collection[Site] = ()
) -> list[str]:
    rows: list[Sequence[object]] = [("site", "norm", "over", "alpha at first", "eps")]
    for site in sites:
        norm = norms.get(site)
        if norm is None:
            rows.append((site, "-", "", "", ""))
            continue
        kind = "SDD layer" if site in PROJECTIONS else "RMSNorm"
        kind += ", left out" if site in left_out else ""
        rows.append((site, kind, _group(site, norm, config), _alpha(norm, config), f"{norm.eps:g}"))
    return aligned(rows)


def _group(site: Site, norm: Norm, config: ModelConfig) -> str:
    if norm.group == "head":
        return f"each head of {config.head_dim}" + (", one alpha for all heads" if norm.shared_alpha else "")
    if site in ("gate", "up") and config.placement.joint_gate_up:
        return f"gate|up together, {2 * config.d_ff}"
    width = {"k": config.kv_width, "v": config.kv_width, "gate": config.d_ff, "up": config.d_ff}
    return f"full width, {width.get(site, config.d_model)}"


def _alpha(norm: Norm, config: ModelConfig) -> str:
    if not norm.scale:
        return "none"
    factor = "" if norm.alpha_factor == 1 else f"{norm.alpha_factor:g} * "
    if norm.alpha_init in SUBLAYER_SCALES:
        return f"{factor}{norm.alpha_init} in sublayer k"
    value = f"{norm.alpha(config.n_layers):.4g}"
    if norm.depth_factor != "one":
        return f"{value}, times {norm.depth_factor}"
    if norm.alpha_init == "one":
        return value
    return f"{value} = {factor}{norm.alpha_init}"


def _sites(placement: Placement) -> str:
    return " ".join(
        f"{site}:h" if norm.group == "head" else site for site in SITES if (norm := placement.norms.get(site))
    ) + (" (gate|up joint)" if placement.joint_gate_up else "")
