"""The study `variants`: single changes of SDD, each at the best of three rates, beside its rivals."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdd.init_rules import Draw
from sdd.lab.arms import DEFAULT, Arm, Condition
from sdd.lab.studies.changes import Change, OneAtATime, define
from sdd.placement import LEARNED_RESIDUAL, Norm, Placement, Scale, Site, placements

_SDD = placements["sdd-v1"]
_ONE, _HEAD = Norm(), Norm(group="head")
_SMALL = {"model.init_scale": 0.25}


def _drawn(name: str, text: str, *, optional: bool = False, **draws: Draw) -> Change:
    """SDD with parts of the model drawn otherwise."""
    return _placed(name, text, replace(_SDD, draws=draws), optional=optional)  # pyright: ignore[reportArgumentType]


def _sites(name: str, text: str, norms: Mapping[Site, Norm | None], **changes: Any) -> Change:
    """SDD with norms replaced, added or (None) left out, and with other fields of its placement."""
    mixed: dict[Site, Norm | None] = {**_SDD.norms, **norms}
    kept: dict[Site, Norm] = {site: norm for site, norm in mixed.items() if norm}
    return _placed(name, text, replace(_SDD, norms=kept, **changes))


def _placed(
    name: str, text: str, placement: Placement, changes: Mapping[str, Any] | None = None, *, optional: bool = False
) -> Change:
    own = replace(placement, source="a variant of sdd-v1 in this study")
    return Change(Arm(name, "sdd-v1", changes or {}, variant=own), text, optional)


def _run(name: str, text: str, optional: bool = False, **optim: Any) -> Change:
    """SDD with other numbers of the optimiser."""
    return Change(Arm(name, "sdd-v1", {f"optim.{field}": value for field, value in optim.items()}), text, optional)


def _scaled(name: str, text: str, scale: float) -> Change:
    return Change(Arm(name, "sdd-v1", {"model.init_scale": scale}), text)


_PRE: dict[Site, Norm | None] = {
    "attn_in": _ONE,
    "ffn_in": _ONE,
    "final": _ONE,
    "attn_post": None,
    "ffn_post": None,
}
_PRENORM = _sites("pre", "norms before the sublayers and the head, none after the additions", _PRE)


def _prenorm(name: str, scale: float) -> Change:
    assert _PRENORM.arm.variant is not None
    return _placed(
        name,
        f"norms before the sublayers and the head, all drawn x{scale:g}",
        _PRENORM.arm.variant,
        {"model.init_scale": scale},
    )


def _prenorm_ones(name: str, scale: float) -> Change:
    """The norms of Pre-Norm SDD, whose outputs count as they do in Peri-LN."""
    assert _PRENORM.arm.variant is not None
    whole = _PRENORM.arm.variant
    whole = replace(whole, norms={**whole.norms, "attn_out": _ONE, "ffn_out": _ONE})
    text = f"norms before the sublayers and the head, output alphas from 1, all drawn x{scale:g}"
    return _placed(name, text, whole, {"model.init_scale": scale}, optional=True)


#: Each with its reason. V turns by about rate / rms(V) a step: a smaller one learns faster at first.
CHANGES = (
    _drawn("v0.5", "matrices of the blocks x0.5: V turns faster at first", blocks=Draw(factor=0.5)),
    _drawn("v0.25", "matrices of the blocks x0.25", blocks=Draw(factor=0.25)),
    _drawn("v0.1", "matrices of the blocks x0.1, as the released script", blocks=Draw(factor=0.1)),
    _drawn("v-one-by-d", "matrices of the blocks at 1/d: falls faster with the width", blocks=Draw("1/d")),
    _drawn("v-0.02", "matrices of the blocks at 0.02 at every width", blocks=Draw("normal-0.02"), optional=True),
    _drawn("embed0.25", "embedding x0.25: under its norm it turns faster", embed=Draw(factor=0.25)),
    _drawn("embed0.1", "embedding x0.1", embed=Draw(factor=0.1)),
    _drawn("embed-unit", "embedding at std 1: it turns slowly and keeps rare tokens apart", embed=Draw("unit")),
    _drawn("head0.25", "head x0.25: logits start near zero", head=Draw(factor=0.25)),
    _drawn(
        "v0.25-embed-unit",
        "matrices of the blocks x0.25, embedding at std 1",
        blocks=Draw(factor=0.25),
        embed=Draw("unit"),
    ),
    _scaled("all0.5", "blocks, embedding and head x0.5", 0.5),
    _scaled("all0.25", "blocks, embedding and head x0.25", 0.25),
    _scaled("all0.1", "blocks, embedding and head x0.1", 0.1),
    _PRENORM,
    _prenorm("pre0.25", 0.25),
    _prenorm("pre0.1", 0.1),
    _sites("no-embed-norm", "no norm on the embedding: its scale counts in the first block", {"embed": None}),
    _sites("v-norm", "norm on v by head too: every branch is then normed", {"v": _HEAD}),
    _sites("qk-full", "q, k norms over the full width, as in OLMo 2", {"q": _ONE, "k": _ONE}),
    _sites(
        "qk-own",
        "q, k norms by head, an alpha for each: heads may differ in how sharply they attend",
        {"q": _HEAD, "k": _HEAD},
    ),
    _sites("ctx-norm", "norm on the attention's context, as released", {"ctx": _ONE}),
    _sites("alpha1", "output alphas from 1: branches count as much as the stream", {"attn_out": _ONE, "ffn_out": _ONE}),
    _sites(
        "alpha-one-by-l",
        "output alphas from 1/(2L): blocks start nearer the identity",
        {"attn_out": Norm(alpha_init="1/(2L)"), "ffn_out": Norm(alpha_init="1/(2L)")},
    ),
    _sites(
        "alpha-by-k",
        "output alphas from 1/sqrt(k) in sublayer k: every sublayer so far counts alike",
        {"attn_out": Norm(alpha_init="1/sqrt(k)"), "ffn_out": Norm(alpha_init="1/sqrt(k)")},
    ),
    _sites(
        "alpha-by-k+L",
        "output alphas from 1/sqrt(k+L): sublayers count alike, the embedding as L + 1 of them",
        {"attn_out": Norm(alpha_init="1/sqrt(k+L)"), "ffn_out": Norm(alpha_init="1/sqrt(k+L)")},
    ),
    _run("alpha-rate4", "rate of all alphas and norms x4", alpha_lr=4.0),
    _run("alpha-rate0.25", "rate of all alphas and norms x0.25", alpha_lr=0.25),
    _run("v-no-decay", "no decay on V: it grows, and turns fade", sdd_weight_decay=0.0),
    _run("rows", "every row of a matrix keeps its length: V turns by the rate alone", weights="rows"),
    _run("hyperball", "every matrix keeps its norm and turns by the rate itself", weights="hyperball"),
    _run(
        "embed-decay",
        "decay on the embedding: under its norm it is a direction, which turns ever more slowly",
        embedding_weight_decay=0.1,
    ),
    _sites(
        "mix-learned",
        "x + |a| (f - x), a learned from 0.05, output alphas 1, as in nGPT",
        {"attn_out": _ONE, "ffn_out": _ONE},
        residual=LEARNED_RESIDUAL,
        scales={"mix": Scale(factor=0.05, stored="1/sqrt(d)")},
    ),
    _placed(
        "mix-depth",
        "sqrt(k/(k+1)) x + f/sqrt(k+1), output alphas 1: every sublayer so far counts alike",
        placements["sdd-depth"],
    ),
    _sites(
        "mix-2L",
        "x + f/sqrt(2L), output alphas 1: as sdd-v1 at first, but those alphas move by a smaller share a step",
        {"attn_out": _ONE, "ffn_out": _ONE},
        residual="x + f/sqrt(2L)",
    ),
    _run("alpha-decay", "decay on all alphas and norms, as released", optional=True, alpha_weight_decay=0.1),
    _prenorm_ones("pre-alpha1", 1.0),
    _prenorm_ones("pre-alpha1-0.5", 0.5),
    _prenorm_ones("pre-alpha1-0.25", 0.25),
    Change(
        Arm("rows-all0.25", "sdd-v1", {"optim.weights": "rows", **_SMALL}),
        "all x0.25, and rows keep those lengths",
        True,
    ),
    Change(Arm("released0.25", "sdd-released", _SMALL), "the released sites, all x0.25", True),
)

SHAPE = OneAtATime(
    base=Arm("sdd-v1", "sdd-v1"),
    changes=CHANGES,
    rivals={
        "peri": (Arm("peri", "peri"), Arm("peri0.25", "peri", _SMALL)),
        "prenorm-qk": (Arm("prenorm-qk", "prenorm-qk"), Arm("prenorm-qk0.25", "prenorm-qk", _SMALL)),
    },
    early=(300_000, 1_000_000),
    rates=True,
    ranked=True,
)

DEFINITION = define(
    SHAPE,
    "variants",
    "A better SDD?",
    "which single change of SDD lowers the loss most at this length, and is it then ahead of its rivals?",
    (
        "Every variant differs from sdd-v1 by one thing; rivals that are shown, Peri-LN and Pre-Norm with norms on q "
        "and k, count at the better of two inits, x1 and x0.25.",
        "All are trained at {rates}, with the same data in the same order; of several rates the one with the lowest "
        "loss counts.",
        "Losses are read at 0.3M, at 1M tokens and at the end of one run.",
    ),
    length=3_000_000,
    conditions=(
        DEFAULT,
        Condition("half", "half the rate", rate_factor=0.5),
        Condition("double", "double the rate", rate_factor=2.0),
    ),
)
