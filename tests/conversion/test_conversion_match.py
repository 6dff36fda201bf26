"""Which layers stay, and the reason given."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sdd import SDDLinear
from sdd.conversion import convert


def linear(features: int = 4) -> nn.Linear:
    return nn.Linear(4, features)


def tree(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def kept(model: nn.Module, **arguments) -> dict[str, str]:
    return {layer.name: layer.reason for layer in convert(model, **arguments).kept}


def converted(model: nn.Module, **arguments) -> list[str]:
    return [layer.name for layer in convert(model, **arguments).converted]


# --- heads and routers ---


@pytest.mark.parametrize("name", ["lm_head", "head", "output", "output_projection", "classifier", "score", "embed_out"])
def test_a_head_is_known_by_its_name(name):
    assert kept(tree(body=linear(), **{name: linear()})) == {name: "the head: its outputs are logits or predictions"}
    inside = tree(body=linear(), **{name: nn.Sequential(nn.Dropout(), linear())})
    assert list(kept(inside)) == [f"{name}.1"]
    assert list(kept(tree(body=linear(), inner=tree(**{name: linear()})))) == [f"inner.{name}"]


@pytest.mark.parametrize(
    "layers", [lambda blocks: nn.ModuleList(blocks[:1]), nn.ModuleList, lambda blocks: nn.Sequential(*blocks)]
)
def test_a_blocks_own_output_is_no_head(layers):
    blocks = [tree(output=linear(), attention=tree(output=tree(dense=linear()))) for _ in range(3)]
    assert list(kept(tree(layers=layers(blocks), output=linear()))) == ["output"]


def test_a_model_may_name_its_head():
    model = tree(body=linear(), predictor=linear())
    model.get_output_embeddings = lambda: model.predictor
    assert list(kept(tree(wrapped=model, last=linear()))) == ["wrapped.predictor"]


def test_without_a_head_a_note_says_so():
    assert any("no head found" in note for note in convert(tree(a=linear())).notes)
    assert not any("head" in note for note in convert(tree(a=linear(), head=linear())).notes)


def test_routers_stay_and_gates_of_a_glu_do_not():
    experts = nn.ModuleList(tree(gate=linear(), gate_proj=linear()) for _ in range(2))
    model = tree(
        moe=tree(gate=linear(), gate_proj=linear(), experts=experts),
        deep=tree(gate=tree(wg=linear()), shared_expert=linear()),
        switch=tree(router=tree(classify=linear())),
        glu=tree(gate=linear(), gate_proj=linear()),
    )
    reasons = kept(model)
    assert list(reasons) == ["moe.gate", "deep.gate.wg", "switch.router.classify"]
    assert set(reasons.values()) == {"a router: its outputs choose experts"}


def test_a_full_name_in_include_overrules_a_guess():
    def model() -> nn.Module:
        return tree(body=linear(), head=linear(), router=linear())

    assert converted(model(), include=["head", "body"]) == ["body", "head"]
    assert converted(model(), include=["router", "*"]) == ["body", "router"]
    assert converted(model(), include="*") == ["body"]
    assert converted(tree(a=linear(), inner=tree(head=linear())), include=["a", "head"]) == ["a"]


# --- layers that compute something else ---


def test_tied_weights_stay():
    model = tree(
        embed=nn.Embedding(4, 4), body=linear(), decode=linear(), a=linear(), b=linear(), c=linear(), d=linear()
    )
    model.decode.weight = model.embed.weight
    model.a.weight = model.b.weight
    model.c.bias = model.d.bias
    assert kept(model) == dict.fromkeys(["decode", "a", "b", "c", "d"], "tied: another module owns the same parameter")
    assert isinstance(model.embed, nn.Embedding)


class Quantised(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.round())


def test_subclasses_parametrised_and_replaced_layers_stay():
    pruned, replaced, integers = linear(), linear(), linear()
    prune.identity(pruned, "weight")
    replaced.forward = lambda x: 2 * x
    integers.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model = tree(
        body=linear(),
        already=SDDLinear(4, 4),
        quantised=Quantised(4, 4),
        lazy=nn.LazyLinear(4),
        spectral=parametrizations.spectral_norm(linear()),
        pruned=pruned,
        replaced=replaced,
        integers=integers,
        single=linear(1),
    )
    reasons = {name: reason for name, reason in kept(model).items() if not name.startswith("spectral.")}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "already": "already an SDDLinear",
        "quantised": "a Quantised",
        "lazy": "a LazyLinear",
        "spectral": "parametrised",
        "pruned": "its weight is a Tensor, not a plain parameter",
        "replaced": "its forward was replaced on the instance",
        "integers": "its weight is torch.int8, not a 16-, 32- or 64-bit float",
        "single": "one output feature",
    }
    assert torch.equal(model.replaced(torch.ones(4)), torch.full((4,), 2.0))


def test_tensor_subclasses_stay():
    class Sharded(torch.Tensor):
        pass

    layer = linear()
    layer.weight = nn.Parameter(torch.ones(4, 4).as_subclass(Sharded))
    assert kept(tree(body=linear(), sharded=layer))["sharded"] == "its weight is a Sharded, not a plain parameter"


def test_multihead_attention_stays_and_is_mentioned():
    model = tree(attention=nn.MultiheadAttention(4, 2), head=linear(), body=linear())
    report = convert(model)
    assert [layer.name for layer in report.kept] == ["attention.in_proj_weight", "attention.out_proj", "head"]
    assert any("nn.MultiheadAttention" in note for note in report.notes)
    x = torch.randn(3, 1, 4)
    assert model.attention(x, x, x)[0].shape == x.shape


def test_matrices_outside_linears_are_listed_and_embeddings_are_not():
    packed = tree()
    packed.up = nn.Parameter(torch.zeros(2, 4, 4))
    packed.scale = nn.Parameter(torch.zeros(4))
    model = tree(embed=nn.Embedding(3, 4), conv=nn.Conv1d(4, 4, 3), experts=packed, body=linear())
    assert kept(model) == {
        "conv.weight": "a matrix of a Conv1d, not of an nn.Linear",
        "experts.up": "stacked matrices of a Module, which does not go through transformers' interface for experts",
    }


# --- patterns ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"include": "q_proj"}, ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        ({"include": "attn.*", "exclude": "*.0.*"}, ["layers.1.attn.q_proj", "layers.1.attn.o_proj"]),
        (
            {"include": ["layers.1.mlp.*", "o_proj"]},
            ["layers.0.attn.o_proj", "layers.1.attn.o_proj", "layers.1.mlp.up"],
        ),
        ({"exclude": ["[qo]_proj", "head"]}, ["layers.0.mlp.up", "layers.1.mlp.up"]),
        ({"include": "*up", "exclude": "layers.0.mlp.up"}, ["layers.1.mlp.up"]),
    ],
)
def test_patterns_fit_full_names_and_endings(arguments, expected):
    def block() -> nn.Module:
        return tree(attn=tree(q_proj=linear(), o_proj=linear()), mlp=tree(up=linear()))

    assert converted(tree(layers=nn.ModuleList([block(), block()]), head=linear()), **arguments) == expected


def test_reasons_tell_excluded_from_not_included():
    assert kept(tree(a=linear(), b=linear(), c=linear()), include=["a", "b"], exclude="b") == {
        "b": "excluded",
        "c": "not included",
    }


def test_a_pattern_that_fits_another_kind_of_layer_says_which():
    with pytest.raises(ValueError, match=r"include='conv' fits no nn.Linear .*it fits inner.conv \(a Conv1d\)"):
        convert(tree(a=linear(), inner=tree(conv=nn.Conv1d(4, 4, 1))), include="conv")


def test_nothing_to_convert_says_what_was_seen():
    with pytest.raises(
        ValueError, match=r"nothing to convert in this Module: 2 x a matrix of a Conv1d.*; 1 x the head"
    ):
        convert(tree(a=nn.Conv1d(4, 4, 1), b=nn.Conv1d(4, 4, 1), head=linear()))
    with pytest.raises(ValueError, match=r"nothing to convert in this Sequential: it has no nn.Linear"):
        convert(nn.Sequential(nn.ReLU()))
    model = tree(a=linear(), b=linear())
    convert(model)
    with pytest.raises(ValueError, match=r"2 x already an SDDLinear"):
        convert(model)
