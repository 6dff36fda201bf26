"""Where the norms stand: every method compared here is data.

A block of a decoder has the sites

    embed | attn_in  q k v  ctx  attn_out  attn_post | ffn_in  gate up  ffn_out  ffn_post | final

and computes, with every absent norm left out,

    x = embed(E[tokens])
    x = attn_post(mix(x, attn_out(ctx(attention(q(h), k(h), v(h))))))    h = attn_in(x)
    x = ffn_post(mix(x, ffn_out(silu(gate(h)) * up(h))))                 h = ffn_in(x)
    logits = head(final(x))

where `mix(x, f)` is the residual rule: `x + f`, DeepNorm's `c * x + f`, or another of `RESIDUALS`.

A norm on q, k, v, attn_out, gate, up or ffn_out makes that projection an `SDDLinear`; the other sites are RMSNorms.
A `Placement` names the norms, a residual rule and an init rule. Rules are named (`1/sqrt(2L)`), not numbers, so that
one placement fits any depth. `placements` holds the methods by name; a new one is a few lines of data. What nGPT needs
beside norms is data too: learned scales without a norm, and matrices that stay on the unit sphere.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from sdd.init_rules import Draw, DrawnPart, check_draws, check_rule, init_words
from sdd.init_rules import InitName as InitName

Site = Literal[
    "embed",
    "attn_in",
    "q",
    "k",
    "v",
    "ctx",
    "attn_out",
    "attn_post",
    "ffn_in",
    "gate",
    "up",
    "ffn_out",
    "ffn_post",
    "final",
]
SITES: tuple[Site, ...] = get_args(Site)
#: Sites at which a norm makes the projection an SDDLinear.
PROJECTIONS: tuple[Site, ...] = ("q", "k", "v", "attn_out", "gate", "up", "ffn_out")
#: Sites of a block's attention; its others are those of the feed-forward network.
ATTENTION: tuple[Site, ...] = ("attn_in", "q", "k", "v", "ctx", "attn_out", "attn_post")
#: Sites that stand once in a model, not in every block.
MODEL_SITES: tuple[Site, ...] = ("embed", "final")

#: Named scales as functions of L, the number of blocks.
SCALES: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {
        "one": lambda L: 1.0,
        "1/sqrt(L)": lambda L: L**-0.5,
        "1/sqrt(2L)": lambda L: (2 * L) ** -0.5,
        "1/(2L)": lambda L: 1 / (2 * L),
        "(2L)^(1/4)": lambda L: (2 * L) ** 0.25,
        "(8L)^(-1/4)": lambda L: (8 * L) ** -0.25,
    }
)
ScaleName = Literal["one", "1/sqrt(L)", "1/sqrt(2L)", "1/(2L)", "(2L)^(1/4)", "(8L)^(-1/4)"]

#: Named initial values of alpha as functions of k, the number of the sublayer from 1 (attention and feed-forward
#: network alternate), and of L. Where `x + alpha norm(V h)` is normed, `1/sqrt(k)` gives the embedding and all
#: sublayers so far equal shares of the stream; with `1/sqrt(k+L)` the embedding has L + 1 of them, a third in the end.
SUBLAYER_SCALES: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {"1/sqrt(k)": lambda k, L: k**-0.5, "1/sqrt(k+L)": lambda k, L: (k + L) ** -0.5}
)
AlphaName = Literal[ScaleName, "1/sqrt(k)", "1/sqrt(k+L)"]

#: Named factors by depth, as functions of l, the number of the block from 1.
DEPTH_FACTORS: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {"one": lambda l: 1.0, "1/sqrt(l)": lambda l: l**-0.5}
)
DepthName = Literal["one", "1/sqrt(l)"]

#: Named residual rules `mix(x, f) = c_x * x + c_f * f`: (c_x, c_f) as a function of k, the number of the sublayer from
#: 1 (attention and feed-forward network alternate), and of L, the number of blocks. `LEARNED_RESIDUAL` is none of them.
RESIDUALS: Mapping[str, Callable[[int, int], tuple[float, float]]] = MappingProxyType(
    {
        "x + f": lambda k, L: (1.0, 1.0),
        "1/sqrt(L) x + f": lambda k, L: (SCALES["1/sqrt(L)"](L), 1.0),
        "1/sqrt(2L) x + f": lambda k, L: (SCALES["1/sqrt(2L)"](L), 1.0),
        "(2L)^(1/4) x + f": lambda k, L: (SCALES["(2L)^(1/4)"](L), 1.0),
        "(8L)^(-1/4) x + f": lambda k, L: (SCALES["(8L)^(-1/4)"](L), 1.0),
        "x + f/sqrt(2L)": lambda k, L: (1.0, SCALES["1/sqrt(2L)"](L)),
        "2L x + f from k=3": lambda k, L: (2.0 * L if k > 2 else 1.0, 1.0),
        "sqrt(k/(k+1)) x + f/sqrt(k+1)": lambda k, L: ((k / (k + 1)) ** 0.5, (k + 1) ** -0.5),
    }
)
#: The residual rule with a rate a for each feature that is learned, the placement's scale "mix".
LEARNED_RESIDUAL = "x + |a| (f - x)"
ResidualName = Literal[
    "x + f",
    "1/sqrt(L) x + f",
    "1/sqrt(2L) x + f",
    "(2L)^(1/4) x + f",
    "(8L)^(-1/4) x + f",
    "x + f/sqrt(2L)",
    "2L x + f from k=3",
    "sqrt(k/(k+1)) x + f/sqrt(k+1)",
    "x + |a| (f - x)",
]

#: Named values as functions of d, the width of the residual stream.
WIDTHS: Mapping[str, Callable[[int], float]] = MappingProxyType({"one": lambda d: 1.0, "1/sqrt(d)": lambda d: d**-0.5})
WidthName = Literal["one", "1/sqrt(d)"]

#: Where a learned scale without a norm may stand: on q and k alike, after RoPE; on gate and up; as the rate a of
#: `LEARNED_RESIDUAL`; on the logits.
ScaleSite = Literal["qk", "gate", "up", "mix", "logits"]
SCALE_SITES: tuple[ScaleSite, ...] = get_args(ScaleSite)


@dataclass(frozen=True)
class Norm:
    """One norm at one site, `y = factor * alpha * norm(z)`.

    Attributes:
        group: "full" takes the mean square over the site's whole width, "head" over each head.
        shared_alpha: one alpha of head_dim for all heads (with group "head").
        alpha_init: named initial value of alpha, see `SCALES` and, in blocks, `SUBLAYER_SCALES`.
        alpha_factor: multiplies the named initial value.
        eps: added to the mean square, inside the root.
        scale: whether the norm has an alpha.
        depth_factor: named factor by depth that is not learned, see `DEPTH_FACTORS`; at a block's RMSNorms only.
    """

    group: Literal["full", "head"] = "full"
    shared_alpha: bool = False
    alpha_init: AlphaName = "one"
    alpha_factor: float = 1.0
    eps: float = 1e-6
    scale: bool = True
    depth_factor: DepthName = "one"

    def __post_init__(self) -> None:
        if self.depth_factor not in DEPTH_FACTORS:
            raise ValueError(f"depth_factor={self.depth_factor!r}: choose one of {list(DEPTH_FACTORS)}")
        if not self.scale and (self.shared_alpha, self.alpha_init, self.alpha_factor) != (False, "one", 1.0):
            raise ValueError("scale=False is a norm without alpha: leave out shared_alpha, alpha_init and alpha_factor")
        if self.alpha_init not in (known := get_args(AlphaName)):
            raise ValueError(f"alpha_init={self.alpha_init!r} is not a named scale: choose one of {list(known)}")
        if self.group not in ("full", "head"):
            raise ValueError(f"group={self.group!r}: choose 'full' or 'head'")
        if self.shared_alpha and self.group != "head":
            raise ValueError("shared_alpha=True shares one alpha among heads: it needs group='head'")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps={self.eps} must be finite and not negative")
        if not math.isfinite(self.alpha_factor):
            raise ValueError(f"alpha_factor={self.alpha_factor} must be finite")

    def alpha(self, n_layers: int) -> float:
        """The initial value of alpha in a model of `n_layers` blocks; of a norm whose value is not by sublayer."""
        return self.alpha_factor * SCALES[self.alpha_init](n_layers)

    def at_sublayer(self, k: int, n_layers: int) -> "Norm":
        """The norm in sublayer k of a model of `n_layers` blocks: a value by sublayer becomes a number."""
        if self.alpha_init not in SUBLAYER_SCALES:
            return self
        value = SUBLAYER_SCALES[self.alpha_init](k, n_layers)
        return replace(self, alpha_init="one", alpha_factor=self.alpha_factor * value)


@dataclass(frozen=True)
class Scale:
    """A learned scale of each feature, without a norm: `s = weight * value / stored`.

    At first the parameter `weight` is `stored`, so s is `value`. Adam moves every parameter by about its learning rate,
    whatever its size. So s moves by `lr * value / stored` a step (arXiv 2410.01131).

    Attributes:
        init: named value of s at first, see `WIDTHS`.
        factor: multiplies the named value.
        stored: named value of the parameter at first, see `WIDTHS`.
    """

    init: WidthName = "one"
    factor: float = 1.0
    stored: WidthName = "one"

    def __post_init__(self) -> None:
        for name in ("init", "stored"):
            if getattr(self, name) not in WIDTHS:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {list(WIDTHS)}")
        if not math.isfinite(self.factor):
            raise ValueError(f"factor={self.factor} must be finite")

    def value(self, d_model: int) -> float:
        """The value of s at first, in a model of this width."""
        return self.factor * WIDTHS[self.init](d_model)


@dataclass(frozen=True)
class Placement:
    """A normalisation method: norms by site, a residual rule and an init rule.

    Attributes:
        norms: the norm at each site; an absent site has none.
        name: what tables and figures call it.
        joint_gate_up: one norm group over the concatenated gate|up vector instead of one each.
        residual: named rule of the residual additions, see `RESIDUALS` and `LEARNED_RESIDUAL`.
        init: named init rule, see `sdd.models.init`.
        draws: parts of the model that are drawn by another rule, or by a multiple of it.
        overrides: for single blocks (by index, negative from the end), sites to change; None removes the norm.
        source: where the definition comes from.
        scales: learned scales without a norm, see `SCALE_SITES`.
        weights: "unit" makes the rows of q, k, v, gate, up, embedding and head, and the columns of the attention output
            and the down projection, unit vectors at first and after every step of the optimiser; "free" does not.
    """

    norms: dict[Site, Norm]
    name: str = ""
    joint_gate_up: bool = False
    residual: ResidualName = "x + f"
    init: InitName = "megatron"
    overrides: dict[int, dict[Site, Norm | None]] = field(default_factory=dict)
    source: str = ""
    scales: dict[ScaleSite, Scale] = field(default_factory=dict)
    weights: Literal["free", "unit"] = "free"
    draws: dict[DrawnPart, Draw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for sites in (self.norms, *self.overrides.values()):
            for site, norm in sites.items():
                if site not in SITES:
                    raise ValueError(f"{site!r} is not a norm site: choose from {list(SITES)}")
                if norm is not None and norm.group == "head" and site not in ("q", "k", "v", "ctx"):
                    raise ValueError(f"site {site!r} has no heads: group='head' fits q, k, v and ctx only")
                if norm is not None and site in PROJECTIONS and norm.depth_factor != "one":
                    raise ValueError(f"site {site!r} is an SDD layer: depth_factor fits RMSNorms only")
                if norm is not None and site in MODEL_SITES and norm.depth_factor != "one":
                    raise ValueError(f"site {site!r} stands in no block: it has no depth_factor")
                if norm is not None and site in MODEL_SITES and norm.alpha_init in SUBLAYER_SCALES:
                    raise ValueError(f"site {site!r} stands in no block: alpha_init={norm.alpha_init!r} has no k there")
        for layer, sites in self.overrides.items():
            misplaced = [site for site in sites if site in MODEL_SITES]
            if misplaced:
                raise ValueError(f"overrides[{layer}] names {misplaced}: these sites stand once in a model, in norms")
        if self.joint_gate_up and not {"gate", "up"} <= self.norms.keys():
            raise ValueError("joint_gate_up=True joins the norms of gate and up: give both in norms")
        for sites in (self.norms, *(self.norms | changes for changes in self.overrides.values())):
            gate, up = sites.get("gate"), sites.get("up")
            if self.joint_gate_up and gate and up and gate.eps != up.eps:
                raise ValueError(f"joint_gate_up=True has one eps: gate has {gate.eps} and up has {up.eps}")
        check_rule("init", self.init)
        check_draws(self.draws)
        if self.residual not in get_args(ResidualName):
            raise ValueError(f"residual={self.residual!r}: choose one of {list(get_args(ResidualName))}")
        self._check_scales()

    def _check_scales(self) -> None:
        for site in self.scales:
            if site not in SCALE_SITES:
                raise ValueError(f"scales names {site!r}: choose from {list(SCALE_SITES)}")
        if ("mix" in self.scales) != (self.residual == LEARNED_RESIDUAL):
            raise ValueError(f"residual={self.residual!r}: {LEARNED_RESIDUAL!r} and scales['mix'] need each other")
        if self.weights not in ("free", "unit"):
            raise ValueError(f"weights={self.weights!r}: choose free or unit")

    @property
    def init_words(self) -> str:
        """The init rule, and the parts that are drawn otherwise."""
        return init_words(self.init, self.draws)

    def layer(self, index: int, n_layers: int) -> dict[Site, Norm]:
        """The norms of block `index` of `n_layers`: overrides applied, and values by sublayer as numbers."""
        named = self.named_layer(index, n_layers)
        k = 2 * index + 1
        return {site: norm.at_sublayer(k + (site not in ATTENTION), n_layers) for site, norm in named.items()}

    def named_layer(self, index: int, n_layers: int) -> dict[Site, Norm]:
        """The norms of block `index` of `n_layers` as they are written, overrides applied."""
        norms: dict[Site, Norm | None] = {site: norm for site, norm in self.norms.items() if site not in MODEL_SITES}
        for layer in (index, index - n_layers):
            norms |= self.overrides.get(layer, {})
        return {site: norm for site, norm in norms.items() if norm is not None}

    def joins_gate_up(self, norms: Mapping[Site, Norm]) -> bool:
        """Whether gate and up share one norm group in a block with these norms."""
        return self.joint_gate_up and norms.keys() >= {"gate", "up"}

    def check_depth(self, n_layers: int) -> None:
        """Raise ValueError if an override names a block that a model of `n_layers` blocks does not have."""
        outside = [layer for layer in self.overrides if not -n_layers <= layer < n_layers]
        if outside:
            raise ValueError(f"overrides name the blocks {outside}, but the model has {n_layers} blocks")

    def replace_eps(self, eps: float) -> "Placement":
        """The same placement with another eps at every site."""
        return replace(
            self,
            norms={site: replace(norm, eps=eps) for site, norm in self.norms.items()},
            overrides={
                layer: {site: norm and replace(norm, eps=eps) for site, norm in sites.items()}
                for layer, sites in self.overrides.items()
            },
        )


def current_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Placement` under today's names, from those of a config that an earlier version wrote.

    Earlier, `residual_scale` named the factor c of the rule `c * x + f`.
    """
    values = dict(values)
    scale = values.pop("residual_scale", None)
    if scale is not None and "residual" not in values:
        values["residual"] = "x + f" if scale == "one" else f"{scale} x + f"
    return values


_ONE = Norm()
_BARE = Norm(scale=False)
_BARE_HEAD = Norm(group="head", scale=False)
_BY_DEPTH = Norm(depth_factor="1/sqrt(l)")
_HEAD = Norm(group="head")
_QK_HEAD: dict[Site, Norm] = {"q": Norm(group="head", shared_alpha=True), "k": Norm(group="head", shared_alpha=True)}
_PRE: dict[Site, Norm] = {"attn_in": _ONE, "ffn_in": _ONE, "final": _ONE}
# As released: the embedding is normed too, and the last ffn_post is the norm before the head.
_POST: dict[Site, Norm] = {"embed": _ONE, "attn_post": _ONE, "ffn_post": _ONE}
_OUT_2L = Norm(alpha_init="1/sqrt(2L)")
_OUT_L = Norm(alpha_init="1/sqrt(L)")
_SDD_SITES: dict[Site, Norm] = {**_POST, **_QK_HEAD, "attn_out": _OUT_2L, "ffn_out": _OUT_2L}
_PAPER_SITES: dict[Site, Norm] = {
    "q": _ONE,
    "k": _ONE,
    "v": _ONE,
    "attn_out": _OUT_L,
    "gate": _ONE,
    "up": _ONE,
    "ffn_out": _OUT_L,
}
_RELEASED_SITES: dict[Site, Norm] = {
    **_QK_HEAD,
    "ctx": _ONE,
    "attn_out": _OUT_2L,
    "gate": _ONE,
    "up": _ONE,
    "ffn_out": _OUT_2L,
}

_PLACEMENTS: dict[str, Placement] = {
    "sdd": Placement(
        _SDD_SITES,
        init="base/2",
        source="this project: SDD where it matters, at the two projections that write to the residual stream",
    ),
    "sdd-v1": Placement(
        _SDD_SITES,
        init="base",
        source="this project's first default: sdd drawn at twice its std",
    ),
    "sdd-depth": Placement(
        {**_POST, **_QK_HEAD, "attn_out": _ONE, "ffn_out": _ONE},
        residual="sqrt(k/(k+1)) x + f/sqrt(k+1)",
        init="base",
        source="this project: SDD whose embedding and sublayers all have equal shares of the stream at first",
    ),
    "sdd-paper": Placement(
        {**_POST, **_PAPER_SITES}, init="base", source="arXiv 2502.15499, figure 2: every fully-connected layer"
    ),
    "sdd-released": Placement(
        {**_POST, **_RELEASED_SITES},
        joint_gate_up=True,
        init="base",
        source="the dense code released with arXiv 2502.15499 (eps 1e-5 there)",
    ).replace_eps(1e-5),
    "sdd-prenorm": Placement(
        {**_PRE, **_PAPER_SITES}, init="base", source="arXiv 2502.15499, figure 8: SDD on Pre-Norm"
    ),
    "prenorm": Placement(_PRE, source="arXiv 2002.04745; Llama"),
    "prenorm-qk": Placement({**_PRE, **_QK_HEAD}, source="arXiv 2302.05442, 2309.14322; Qwen3"),
    "postnorm": Placement(_POST, source="arXiv 1706.03762, with the norm on the embedding of the released wiring"),
    "deepnorm": Placement(_POST, residual="(2L)^(1/4) x + f", init="deepnorm", source="arXiv 2203.00555, decoder-only"),
    "olmo2": Placement(
        {"q": _ONE, "k": _ONE, "attn_out": _ONE, "ffn_out": _ONE, "final": _ONE},
        init="normal-0.02",
        source="arXiv 2501.00656, section 3",
    ),
    "peri": Placement(
        {**_PRE, "embed": _ONE, "attn_out": _ONE, "ffn_out": _ONE},
        init="normal-0.02",
        source="arXiv 2502.02732, with the norm on the embedding",
    ),
    "peri-depth": Placement(
        {**_PRE, "embed": _ONE, "attn_out": _ONE, "ffn_out": _ONE},
        residual="sqrt(k/(k+1)) x + f/sqrt(k+1)",
        init="normal-0.02",
        source="second-hand, from the release of a 501B model: Peri-LN with a residual weighted by depth",
    ),
    "hybrid": Placement(
        {"q": _HEAD, "k": _HEAD, "v": _HEAD, "attn_post": _ONE, "final": _ONE}, source="arXiv 2503.04598, HybridNorm"
    ),
    "qkv-norm": Placement(
        {"q": _ONE, "k": _ONE, "v": _ONE, "ffn_in": _ONE, "final": _ONE},
        source="arXiv 2410.16682: norms on q, k, v in place of the norm before the attention",
    ),
    "lns": Placement(
        {"attn_in": _BY_DEPTH, "ffn_in": _BY_DEPTH, "final": _ONE},
        init="base",
        source="arXiv 2502.05795, LayerNorm Scaling: Pre-Norm, its norms times 1/sqrt(l); no scaled init beside it",
    ),
    "keel": Placement(
        {"attn_in": _ONE, "attn_post": _ONE, "ffn_in": _ONE, "ffn_post": _ONE},
        residual="2L x + f from k=3",
        init="base",
        overrides={0: {"attn_post": None}},
        source="arXiv 2601.19895; the last norm is the one before the head, which is not sure",
    ),
    "ngpt": Placement(
        {
            "embed": _BARE,
            "q": _BARE_HEAD,
            "k": _BARE_HEAD,
            "attn_out": _BARE,
            "attn_post": _BARE,
            "ffn_out": _BARE,
            "ffn_post": _BARE,
        },
        residual=LEARNED_RESIDUAL,
        init="1/sqrt(d)",
        scales={
            "qk": Scale(stored="1/sqrt(d)"),
            "gate": Scale(),
            "up": Scale(),
            "mix": Scale(factor=0.05, stored="1/sqrt(d)"),
            # the stream has rms 1 here and length 1 there: s_z / sqrt(d) here is s_z there
            "logits": Scale(init="1/sqrt(d)", stored="1/sqrt(d)"),
        },
        weights="unit",
        source="arXiv 2410.01131 and its authors' code (no eps there)",
    ),
}
#: The methods by name; see docs/placements.md for the table.
placements: Mapping[str, Placement] = MappingProxyType(
    {name: replace(placement, name=name) for name, placement in _PLACEMENTS.items()}
)
