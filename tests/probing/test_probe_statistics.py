"""Every statistic against the equations, written out plainly in float64, for every placement."""

import math

import pytest
import torch
from helpers_probing import (
    Plain,
    assert_close,
    drawn_tokens,
    expected_layers,
    expected_sites,
    expected_weights,
    merged,
    parameters_of,
    plain_attention,
    tiny_model,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sdd
from sdd.placement import placements
from sdd.probing.attention import sampled_attention
from sdd.probing.updates import angle
from sdd.probing.watched import norm_ratio


def probed_step(model, parts, eos=None):
    """One AdamW step, probed; the row, and parameters and gradients around it."""
    optimizer = torch.optim.AdamW(sdd.param_groups(model), lr=1e-3)
    probe = sdd.Probe(model, optimizer)
    before = parameters_of(model)
    for part in parts:
        (model(part[:, :-1], part[:, 1:], document_eos=eos) / len(parts)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return probe.latest, before, parameters_of(model), gradients


@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize("placement", placements)
def test_every_statistic_is_that_of_the_equations(placement, n_parts):
    model = tiny_model(placement, tie_embeddings=n_parts == 1)
    parts = drawn_tokens(batch=3 * n_parts).chunk(n_parts)
    plain = [Plain(model, part, weight=1 / n_parts) for part in parts]
    row, before, after, gradients = probed_step(model, parts)
    assert_close(row["sites"], merged(expected_sites(plain), expected_weights(before, after, gradients)))
    for name, gradient in gradients.items():  # the plain model is the model
        torch.testing.assert_close(sum(part.w[name].grad for part in plain), gradient.double(), rtol=1e-3, atol=1e-6)
    expected = expected_layers(plain)
    assert row["layers"].keys() == expected.keys()
    for stat, values in expected.items():
        assert row["layers"][stat] == pytest.approx(values, rel=2e-4), stat
    assert row["step"] == 1


def test_sites_stand_in_the_order_of_the_model():
    row, *_ = probed_step(tiny_model("sdd-released"), [drawn_tokens()])
    names = list(row["sites"])
    assert names[:3] == ["embed", "embed_norm", "blocks.0.attn"]
    assert names[3].startswith("blocks.0.attn.")
    assert names.index("blocks.0.ffn.up_proj") < names.index("blocks.1.attn") < names.index("blocks.1.ffn_post")
    assert names[-1] == "logits"


@pytest.mark.parametrize("batch", [1, 5])
def test_attention_within_documents(batch):
    model = tiny_model("sdd")
    tokens = drawn_tokens(batch=batch, vocab_size=6)
    expected = expected_sites([Plain(model, tokens, eos=2)])
    causal = expected_sites([Plain(model, tokens)])
    row, *_ = probed_step(model, [tokens], eos=2)
    for name in ("blocks.0.attn", "blocks.1.attn"):
        assert row["sites"][name] == pytest.approx(expected[name], rel=2e-4)
        assert expected[name]["entropy"] < 0.9 * causal[name]["entropy"]


def test_float64_and_bfloat16_models():
    row, *_ = probed_step(tiny_model("sdd-paper").double(), [drawn_tokens()])
    single, *_ = probed_step(tiny_model("sdd-paper"), [drawn_tokens()])
    assert_close(single["sites"], row["sites"])
    with torch.autocast("cpu", torch.bfloat16):
        half, *_ = probed_step(tiny_model("sdd-paper"), [drawn_tokens()])
    assert_close(
        {site: {"rms": stats["rms"]} for site, stats in half["sites"].items() if "rms" in stats},
        {site: {"rms": stats["rms"]} for site, stats in row["sites"].items() if "rms" in stats},
        rel=0.02,
    )


# --- attention


@st.composite
def attention_calls(draw):
    """Arguments of scaled_dot_product_attention: grouped heads, masks of either kind, other lengths, a scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    B, K, G, T, S, D = (draw(st.integers(1, n)) for n in (6, 3, 3, 40, 40, 8))
    q = torch.randn(B, K * G, T, D, generator=generator) * draw(st.sampled_from([0.1, 1.0, 30.0]))
    k = torch.randn(B, K, S, D, generator=generator)
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    mask = None
    if kind in ("bool", "float"):
        shape = [draw(st.sampled_from([1, n])) for n in (B, K * G, T)]
        mask = torch.rand(*shape, S, generator=generator) < 0.6
        mask = mask[(0,) * draw(st.sampled_from([0, 2]))] if shape[:2] == [1, 1] else mask
        if kind == "float":
            mask = torch.where(mask, torch.randn(mask.shape, generator=generator), -torch.inf)
    return q, k, mask, kind == "causal", draw(st.sampled_from([None, 0.3]))


@given(attention_calls())
def test_sampled_attention_is_that_of_the_whole_matrix(call):
    q, k, mask, causal, scale = call
    T, S = q.shape[2], k.shape[2]
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        logits = logits.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    largest, entropies = plain_attention(logits, logits.softmax(-1))
    found, entropy, rows = sampled_attention(q, k, mask, causal, scale)
    assert rows.item() == len(entropies)
    assert found.item() == pytest.approx(largest, rel=1e-5, abs=1e-5)
    assert entropy.item() == pytest.approx(sum(entropies), rel=1e-4, abs=1e-4)


def test_a_logit_that_is_no_number_shows():
    q = torch.randn(1, 1, 3, 4)
    q[0, 0, 1, 2] = math.nan
    largest, entropy, rows = sampled_attention(q, torch.randn(1, 1, 3, 4), None, True)
    assert largest.isnan()
    assert entropy.isnan()
    assert rows == 3


# --- angles


@given(st.floats(-9, 0.4), st.floats(-6, 6), st.floats(-3, 3))
def test_angles_keep_their_digits_however_small(log_angle, log_length, log_growth):
    theta, length, growth = 10**log_angle, 10**log_length, 1 + 10**log_growth * 1e-3
    before = length, 0.0
    after = length * growth * math.cos(theta), length * growth * math.sin(theta)
    # the difference as float32 sums would give it, 1 - cos computed without cancellation
    step = (length * (growth - 1) - 2 * length * growth * math.sin(theta / 2) ** 2, after[1])
    found = angle(length**2, step[0] ** 2 + step[1] ** 2, step[0] * before[0])
    radial = length * (growth - 1)
    noise = 1e-7 * abs(radial) / (length * growth)  # what float64 keeps of a turn within a growth
    assert found == pytest.approx(theta, rel=1e-6, abs=noise)


def test_no_angle_where_there_is_no_direction():
    assert math.isnan(angle(0.0, 1.0, 0.0))
    assert math.isnan(angle(1.0, 1.0, -1.0))  # W + D = 0
    assert math.isnan(angle(math.inf, 1.0, 0.0))
    assert angle(1.0, 4.0, -2.0) == pytest.approx(math.pi)


# --- eps against what it is added to


@pytest.mark.parametrize(
    ("module", "eps", "centred"),
    [
        (nn.LayerNorm(6, eps=0.1), 0.1, True),
        (nn.LayerNorm((4, 6), eps=0.1), 0.1, True),
        (nn.RMSNorm(6, eps=0.1), 0.1, False),
        (nn.RMSNorm((4, 6)), torch.finfo(torch.float32).eps, False),
        (sdd.RMSNorm(6, eps=0.1), 0.1, False),
    ],
)
def test_eps_of_norms(module, eps, centred):
    x = torch.randn(3, 4, 6) + 1
    rows = x.double().flatten(-len(getattr(module, "normalized_shape", (6,))))
    expected = eps / (rows.var(-1, correction=0) if centred else rows.square().mean(-1))
    torch.testing.assert_close(norm_ratio(module, x), expected.flatten().float(), rtol=1e-4, atol=0)


PART = st.sampled_from([(4, 2), (6, 3), (4, 4), (5, 0)])


@given(st.lists(PART, min_size=1, max_size=4).filter(lambda parts: any(width for _, width in parts)))
def test_eps_of_groups_and_plain_parts(parts):
    layer = sdd.SDDLinear(3, sum(width for width, _ in parts), group=parts, eps=0.2)
    z = torch.randn(2, 5, layer.out_features)
    pieces = zip(z.double().split([width for width, _ in parts], -1), parts, strict=True)
    expected = [piece.unflatten(-1, (-1, width)).square().mean(-1).flatten() for piece, (_, width) in pieces if width]
    torch.testing.assert_close(norm_ratio(layer, z), (0.2 / torch.cat(expected)).float(), rtol=1e-4, atol=0)


def test_a_norm_that_does_not_say_its_eps():
    class MyNorm(nn.Module):
        pass

    assert norm_ratio(MyNorm(), torch.randn(2, 3)) is None
