"""Norm groups of fused projections: found, chosen, and what they compute."""

import pytest
import torch
from helpers_trees import stack, tree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sdd.conversion import convert, known
from sdd.conversion.groups import shown
from sdd.functional import norm

HEADS = 4


def groups(model: nn.Module, **arguments) -> dict[str, object]:
    return {layer.name: layer.group for layer in convert(model, **arguments).converted}


def attention(name: str, n_in: int, n_out: int, n_context: int, **numbers: int) -> nn.Module:
    module = tree(**{name: nn.Linear(n_in, n_out), "proj": nn.Linear(n_context, n_in)})
    vars(module).update(numbers)
    return module


@given(
    name=st.sampled_from(["qkv_proj", "Wqkv", "qkv", "to_qkv", "att_proj"]),
    heads=st.integers(1, 4),
    ratio=st.integers(1, 3),
    width=st.integers(2, 5),
)
def test_queries_keys_and_values_are_normed_apart(name: str, heads: int, ratio: int, width: int):
    q, kv = heads * ratio * width, heads * width
    model = tree(att=attention(name, 16, q + 2 * kv, q, num_heads=heads * ratio, head_dim=width))
    parts = ((q, q), (kv, kv), (kv, kv))
    assert groups(model)[f"att.{name}"] == parts
    layer = getattr(model.att, name).double()
    nn.init.uniform_(layer.alpha)
    x = torch.randn(3, 16, dtype=torch.float64)
    z = x @ layer.weight.T
    expected = layer.alpha * torch.cat([norm(part) for part in z.split([q, kv, kv], -1)], -1) + layer.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", ["c_attn", "Wqkv", "in_proj", "qkv"])
def test_without_numbers_of_heads_a_threefold_projection_has_thirds(name: str):
    assert groups(tree(att=attention(name, 8, 24, 8)))[f"att.{name}"] == ((8, 8),) * 3


def test_interleaved_heads_get_a_group_each():
    """query_key_value holds q, k and v of one head side by side in most models: a group a head is right either way."""
    model = tree(att=attention("query_key_value", 16, 48, 16, num_attention_heads=4, head_size=4))
    assert groups(model)["att.query_key_value"] == 4


@given(latent=st.integers(2, 8), rotary=st.integers(0, 4))
def test_latent_keys_and_their_rotary_part_are_normed_apart(latent: int, rotary: int):
    model = tree(att=attention("kv_a_proj", 8, latent + rotary, 8, kv_lora_rank=latent, qk_rope_head_dim=rotary))
    assert groups(model)["att.kv_a_proj"] == (((latent, latent), (rotary, rotary)) if rotary else None)


@given(state=st.integers(0, 4), heads=st.integers(0, 4))
def test_parts_of_width_zero_are_left_out(state: int, heads: int):
    numbers = {"intermediate_size": 8, "n_groups": 1, "ssm_state_size": state, "num_heads": heads}
    model = tree(mixer=attention("in_proj", 8, 16 + 2 * state + heads, 8, dt_bias=0, **numbers))
    assert all(width > 0 for width, _ in groups(model)["mixer.in_proj"])


@pytest.mark.parametrize("name", ["gate_up_proj", "w12", "Wi", "in_proj", "fc1"])
def test_gate_and_up_are_normed_apart(name: str):
    assert groups(tree(mlp=tree(**{name: nn.Linear(8, 24), "out": nn.Linear(12, 8)})))[f"mlp.{name}"] == (
        (12, 12),
        (12, 12),
    )
    assert groups(tree(mlp=tree(**{name: nn.Linear(8, 20), "out": nn.Linear(20, 8)})))[f"mlp.{name}"] is None


def test_a_fused_projection_of_unknown_parts_is_noted():
    report = convert(tree(att=tree(qkv=nn.Linear(8, 9))))
    assert report.converted[0].group is None
    assert any(note.startswith("att.qkv looks like a fused projection") for note in report.notes)


# --- chosen ---


def separate() -> nn.Module:
    module = tree(q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 4), v_proj=nn.Linear(8, 4), o_proj=nn.Linear(8, 8))
    module.num_heads, module.head_dim = 4, 2
    return module


def test_heads_by_choice():
    assert groups(tree(layers=stack(2, separate)), group="heads") == {
        f"layers.{i}.{name}": 2 if name in ("q_proj", "k_proj") else None
        for i in (0, 1)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert not any(groups(separate()).values())
    fused = tree(att=attention("qkv_proj", 8, 16, 8, num_heads=4, head_dim=2))
    assert groups(fused, group="heads")["att.qkv_proj"] == ((8, 2), (4, 2), (4, 4))


def test_groups_by_pattern():
    chosen = groups(separate(), group={"[qk]_proj": "heads", "v_proj": 1, "o_proj": [(4, 2), (4, 0)]})
    assert chosen == {"q_proj": 2, "k_proj": 2, "v_proj": 1, "o_proj": ((4, 2), (4, 0))}
    fused = tree(att=attention("qkv_proj", 8, 16, 8, num_heads=4, head_dim=2))
    assert groups(fused, group={"qkv_proj": None})["att.qkv_proj"] is None


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"q": 2}, r"group='q' fits no nn.Linear.*nearest"),
        ({"q_proj": 3}, r"group=3 of q_proj: group=3 does not divide the 8 output features"),
        ({"q_proj": [(4, 2)]}, r"of q_proj: the parts \[\(4, 2\)\] add up to 4"),
        ({"o_proj": "heads"}, r"no heads are known of o_proj; give the width of a head"),
        ({"q_proj": "quarters"}, r"group='quarters' of q_proj: "),
        ("head", r"group='head': give 'heads', or a dict of groups by pattern"),
        (64, r"group=64: give 'heads', or a dict of groups by pattern"),
    ],
)
def test_a_group_that_does_not_fit_says_so_and_changes_nothing(group, message: str):
    model = separate()
    with pytest.raises(ValueError, match=message):
        convert(model, group=group)
    assert all(type(child) is nn.Linear for child in model.children())


# --- shown ---


def test_the_report_shows_groups():
    assert shown(64) == "groups of 64"
    assert shown([(32, 8), (16, 16), (4, 0)]) == "parts 32/8|16|4 plain"
    assert shown(None) == ""
    report = convert(tree(layers=stack(2, lambda: attention("qkv", 8, 24, 8))))
    assert any(
        line.split() == ["layers.{0,1}.qkv", "[24,", "8]", "1", "parts", "8|8|8"] for line in str(report).split("\n")
    )


# --- transformers ---

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "pad_token_id": 0}


def build(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"intermediate_size": 24, "num_attention_heads": 4, **TINY}
    if kind == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32}
    elif kind == "Mpt":
        sizes = {"d_model": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 32}
    elif kind == "Phi3":
        sizes |= {"num_key_value_heads": 2}
    elif kind == "Mamba2":
        sizes = {**TINY, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2}
    elif kind == "Mamba":
        sizes = {**TINY, "state_size": 4}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GPT2", {"c_attn": ((16, 16),) * 3}),
        ("Mpt", {"Wqkv": ((16, 16),) * 3}),
        ("Phi3", {"qkv_proj": ((16, 16), (8, 8), (8, 8)), "gate_up_proj": ((24, 24), (24, 24))}),
        ("GPTNeoX", {"query_key_value": 4}),
        ("Bloom", {"query_key_value": 4}),
        ("Falcon", {"query_key_value": 4}),
        ("Mamba", {"in_proj": ((32, 32), (32, 32)), "x_proj": ((1, 1), (4, 4), (4, 4))}),
        ("Mamba2", {"in_proj": ((32, 32), (32, 32), (8, 8), (8, 8), (4, 0))}),
    ],
)
def test_fused_projections_of_transformers(kind: str, expected: dict[str, object], monkeypatch):
    monkeypatch.setattr(known, "KNOWN", ())  # Mamba's kernels read x_proj
    found = groups(build(kind))
    assert {name.rpartition(".")[2]: group for name, group in found.items() if group is not None} == expected


def test_a_fused_model_runs_and_learns():
    model = build("Phi3")
    convert(model, group="heads")
    y: Tensor = model(input_ids=torch.arange(8)[None]).last_hidden_state
    y.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
