"""What must stay, stays: by structure, by name, and by what was set on purpose."""

import pytest
import torch
from helpers_trees import stack, tree
from torch import nn

from sdd.conversion import convert

D = 8


def linear(n_out: int = D, n_in: int = D) -> nn.Linear:
    return nn.Linear(n_in, n_out)


def block() -> nn.Module:
    return tree(att=tree(q=linear(), o=linear()), mlp=tree(up=linear(24), down=linear(D, 24)))


def kept(model: nn.Module, **arguments) -> dict[str, str]:
    return {layer.name: layer.reason for layer in convert(model, **arguments).kept}


# --- values set on purpose ---


def test_one_input_feature_stays():
    assert kept(tree(body=linear(), scalar=linear(D, 1))) == {
        "scalar": "one input feature: the norm would erase its magnitude"
    }


def zeroed() -> nn.Linear:
    layer = linear()
    nn.init.zeros_(layer.weight)
    return layer


def with_bias(value) -> nn.Linear:
    layer = linear()
    with torch.no_grad():
        layer.bias.copy_(torch.as_tensor(value))
    return layer


SET = {
    "frozen": (lambda: linear().requires_grad_(False), "frozen"),
    "zero": (zeroed, "its weight is zero"),
    "forget": (lambda: with_bias(1.0), "its bias was set on purpose"),
    "dt": (lambda: with_bias(torch.linspace(-7, -2, D)), "its bias was set on purpose"),
}


@pytest.mark.parametrize("name", SET)
def test_what_was_set_on_purpose_stays_unless_asked(name: str):
    build, reason = SET[name]

    def model() -> nn.Module:
        return tree(a=linear(), b=linear(), c=linear(), odd=build())

    model_ = model()
    before = {key: value.clone() for key, value in model_.odd.state_dict().items()}
    assert kept(model_)["odd"].startswith(reason)
    assert all(torch.equal(model_.odd.state_dict()[key], value) for key, value in before.items())
    assert kept(model(), include=["*", "odd"]) == {}
    assert list(kept(model(), include="*")) == ["odd"]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.02])
def test_biases_as_initialisations_draw_them_are_no_reason_to_stay(scale: float):
    model = tree(a=linear(), b=linear(), c=linear())
    nn.init.normal_(model.a.bias, std=scale)
    assert kept(model) == {}


def test_memory_that_nobody_filled_is_no_purpose():
    model = tree(a=zeroed(), b=linear())
    assert kept(model) == {}
    assert model.a.weight.any()
    assert kept(tree(a=with_bias(5.0), b=with_bias(-3e8), c=linear())) == {}


# --- adapters ---


def test_adapters_and_what_they_wrap_stay():
    lora = tree(base_layer=linear(), lora_A=nn.ModuleDict({"default": linear(2)}), lora_B=linear(D, 2))
    own = tree(linear=linear(), lora_a=linear(2), lora_b=linear(D, 2))
    model = tree(body=linear(), q=lora, k=own, adapter=tree(down=linear(2), up=linear(D, 2)), q_a_proj=linear())
    assert kept(model) == dict.fromkeys(
        [
            "q.base_layer",
            "q.lora_A.default",
            "q.lora_B",
            "k.linear",
            "k.lora_a",
            "k.lora_b",
            "adapter.down",
            "adapter.up",
        ],
        "an adapter, or what one wraps",
    )


# --- routers ---


@pytest.mark.parametrize(
    "name", ["gate", "router", "gating", "wg", "switch", "routing", "gate_network", "w_gate", "xyz"]
)
def test_routers_stay_by_structure_and_by_name(name: str):
    """`xyz`: as many outputs as there are experts beside it."""

    def moe() -> nn.Module:
        return tree(**{name: linear(3)}, parts=stack(3, lambda: tree(up=linear(24), down=linear(D, 24))))

    model = tree(layers=stack(2, lambda: tree(att=tree(q=linear(), o=linear()), moe=moe())))
    router = "a router: its outputs choose experts"
    assert kept(model) == {f"layers.{i}.moe.{name}": router for i in (0, 1)}


@pytest.mark.parametrize("name", ["gate", "w_gate", "gating", "wg"])
def test_gates_of_a_glu_are_converted(name: str):
    glu = tree(**{name: linear(24), "w_up": linear(24), "w_down": linear(D, 24)})
    assert kept(tree(glu=glu)) == {}


def test_a_router_beside_stacked_experts_stays():
    experts = tree()
    experts.up = nn.Parameter(torch.randn(5, 24, D))
    model = tree(body=linear(), moe=tree(choose=linear(5), bank=experts))
    assert kept(model)["moe.choose"] == "a router: its outputs choose experts"


# --- heads ---


@pytest.mark.parametrize(
    "name", ["fc", "mlm_head", "value_head", "logits", "classification_head", "class_embed", "bbox_embed", "lm_heads"]
)
def test_heads_by_name(name: str):
    model = tree(body=linear(), **{name: nn.ModuleList([linear(), linear()]) if name == "lm_heads" else linear()})
    reasons = kept(model)
    assert reasons
    assert all(key.startswith(name) and "the head" in reason for key, reason in reasons.items())


def test_a_last_layer_that_nobody_reads_is_a_head():
    model = tree(layers=stack(2, block), pooler=linear(), regress=tree(dense=linear(), out=linear(5)))
    report = convert(model)
    assert [layer.name for layer in report.kept] == ["regress.out"]
    assert "taken for a head" in report.kept[0].reason
    assert [layer.name for layer in report.converted if layer.outside] == ["pooler", "regress.dense"]
    assert any("outside the blocks: pooler, regress.dense" in note for note in report.notes)
    assert not any("no head found" in note for note in report.notes)
    assert "outside the blocks" in str(report)


def test_layers_of_the_size_of_labels_or_vocabulary_are_heads():
    model = tree(embed=nn.Embedding(24, D), layers=stack(2, block), last=linear(24))
    assert kept(model) == {}  # 24 is a width that the blocks read
    model = tree(embed=nn.Embedding(24, D), layers=stack(2, block), last=linear(24))
    model.vocab_size = 24
    assert kept(model) == {"last": "the head: its outputs are logits or predictions"}


def test_inside_the_blocks_nothing_is_a_head():
    model = tree(layers=stack(2, lambda: tree(fc=linear(24), value_head=linear(D, 24))))
    report = convert(model)
    assert report.kept == ()
    assert not any("outside" in note for note in report.notes)


def test_without_blocks_no_layer_is_outside_them():
    report = convert(nn.Sequential(linear(16), nn.ReLU(), linear(5, 16)))
    assert len(report.converted) == 2
    assert not any("outside" in note for note in report.notes)


def test_a_resnets_fc_stays():
    model = tree(conv=nn.Conv2d(3, 8, 3), body=linear(), fc=linear(1000))
    assert kept(model)["fc"] == "the head: its outputs are logits or predictions"
