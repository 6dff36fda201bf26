"""How a language model behaves, whatever its placement."""

import pytest
import torch
import torch.nn.functional as F
from helpers_models import drawn_tokens, tiny_config, tiny_model
from torch import Tensor

from sdd import Norm, Placement, SDDLinear, placements
from sdd.models import LanguageModel
from sdd.models.transformer import HAS_CHUNKED_LOSS, cross_entropy
from sdd.placement import PROJECTIONS

every_placement = pytest.mark.parametrize("name", placements)
WITH_SDD = [name for name, placement in placements.items() if placement.norms.keys() & set(PROJECTIONS)]


def loss_and_gradients(model: LanguageModel, tokens: Tensor, **settings: object) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(tokens, tokens.roll(-1, 1), **settings)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip(dict(model.named_parameters()), gradients, strict=True))


# --- tokens see their past, in their row, in their document ---


@every_placement
def test_a_token_changes_nothing_before_it(name: str):
    model = tiny_model(name)
    tokens = drawn_tokens(model.config)
    logits = model(tokens)
    for t in (1, 6, 11):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % model.config.vocab_size
        others = model(changed)
        assert torch.equal(others[:, :t], logits[:, :t])
        assert not torch.isclose(others[:, t:], logits[:, t:]).all(-1).any()


@every_placement
def test_rows_of_a_batch_do_not_mix(name: str):
    model = tiny_model(name)
    tokens = drawn_tokens(model.config)
    changed = torch.stack([tokens[0], tokens[1].flip(0)])
    assert torch.equal(model(changed)[0], model(tokens)[0])


@every_placement
def test_packed_documents_equal_separate_ones(name: str):
    model = tiny_model(name, dtype=torch.float64)
    for block in model.blocks:
        if block.attn.qk_scale is not None:  # it stands after RoPE: where s differs in a pair, positions are absolute
            block.attn.qk_scale.reset_parameters()
    eos = 0
    first, second = (drawn_tokens(model.config, n, seed=n).clamp(min=1) for n in (5, 7))
    first[:, -1] = eos
    packed = torch.cat([first, second], 1)
    separate = torch.cat([model(first), model(second)], 1)
    # positions of the second document start at 5 when packed: equal up to the float32 tables of RoPE
    torch.testing.assert_close(model(packed, document_eos=eos), separate, rtol=1e-6, atol=1e-6)
    assert not torch.isclose(model(packed)[:, 5:], separate[:, 5:], atol=1e-4).all(-1).any()


# --- training ---


@every_placement
def test_a_gradient_reaches_every_parameter(name: str):
    model = tiny_model(name)
    _, gradients = loss_and_gradients(model, drawn_tokens(model.config))
    for parameter, gradient in gradients.items():
        assert gradient.isfinite().all(), parameter
        dead = gradient.flatten(1) if gradient.ndim > 1 else gradient
        used = dead.abs().amax(-1) > 0
        assert used.all() or parameter == "embed.weight", parameter


@every_placement
def test_checkpointing_recomputes_blocks_and_changes_nothing(name: str):
    model = tiny_model(name)
    tokens = drawn_tokens(model.config)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    expected = loss_and_gradients(model, tokens, document_eos=3)
    assert len(calls) == 1
    model.checkpoint_blocks = True
    torch.testing.assert_close(loss_and_gradients(model, tokens, document_eos=3), expected, rtol=0, atol=0)
    assert len(calls) == 3


def test_a_new_placement_is_data_and_trains():
    placement = Placement(
        {"embed": Norm(), "k": Norm(group="head"), "ctx": Norm(group="head", shared_alpha=True), "ffn_post": Norm()},
        overrides={0: {"ffn_in": Norm(), "k": None}, -1: {"ffn_out": Norm(alpha_init="1/sqrt(L)")}},
    )
    model = tiny_model(placement)
    assert {name for name, p in model.named_parameters() if p.ndim == 1 and name.startswith("blocks")} == {
        "blocks.0.attn.ctx.weight",
        "blocks.0.ffn_in.weight",
        "blocks.0.ffn_post.weight",
        "blocks.1.attn.k_proj.alpha",
        "blocks.1.attn.ctx.weight",
        "blocks.1.ffn_post.weight",
        "blocks.2.attn.k_proj.alpha",
        "blocks.2.attn.ctx.weight",
        "blocks.2.ffn.down_proj.alpha",
        "blocks.2.ffn_post.weight",
    }
    tokens = drawn_tokens(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, tokens.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- scale invariance, the property the method is named for ---


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_SDD)
def test_logits_do_not_see_the_scale_of_a_matrix_under_a_norm(name: str):
    model = tiny_model(placements[name].replace_eps(1e-20), dtype=torch.float64)
    tokens = drawn_tokens(model.config)
    logits = model(tokens)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SDDLinear)}
    assert layers
    if placements[name].joint_gate_up:  # one norm over both: they are scaled together
        gates = [layers.pop(f"blocks.{i}.ffn.gate_proj") for i in range(3)]
        ups = [layers.pop(f"blocks.{i}.ffn.up_proj") for i in range(3)]
        for gate, up in zip(gates, ups, strict=True):
            gate.weight.mul_(3)
            assert not torch.isclose(model(tokens), logits, atol=1e-4).all()
            up.weight.mul_(3)
            torch.testing.assert_close(model(tokens), logits, rtol=1e-10, atol=1e-10)
    for layer in layers.values():
        layer.weight.mul_(3)
        torch.testing.assert_close(model(tokens), logits, rtol=1e-10, atol=1e-10)


# --- compiled, in bfloat16 ---


@pytest.mark.parametrize("name", ["sdd-released", "prenorm-qk"])
def test_a_compiled_model_has_the_same_loss_and_gradients(name: str):
    model = tiny_model(name, n_layers=1)
    tokens = drawn_tokens(model.config)
    expected = loss_and_gradients(model, tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(tokens, tokens.roll(-1, 1))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(dict(zip(expected[1], gradients, strict=True)), expected[1])


@every_placement
def test_bfloat16_autocast_stays_near_float32(name: str):
    model = tiny_model(name)
    tokens = drawn_tokens(model.config)
    loss, gradients = loss_and_gradients(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low_gradients = loss_and_gradients(model, tokens)
        assert model(tokens).dtype == torch.bfloat16
    assert low_loss.dtype == torch.float32
    assert low_loss == pytest.approx(loss.item(), rel=0.005)
    flat, low_flat = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients, low_gradients))
    assert low_flat.dtype == torch.float32
    assert (low_flat - flat).norm() < 0.2 * flat.norm()


# --- losses ---


def test_a_sequence_longer_than_the_context_is_refused():
    model = tiny_model("sdd")
    with pytest.raises(ValueError, match="13 tokens was given, the model's context is 12"):
        model(drawn_tokens(model.config, 13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_mean_surprise_and_z_loss_its_addition(tied: bool, dtype: torch.dtype):
    model = tiny_model("sdd", tie_embeddings=tied, dtype=dtype)
    tokens = drawn_tokens(model.config)
    targets = tokens.roll(-1, 1)
    logits = model(tokens)
    z = logits.exp().sum(-1).log()
    surprise = z - logits.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, targets), surprise.mean())
    torch.testing.assert_close(model(tokens, targets, reduction="none"), surprise)
    torch.testing.assert_close(model(tokens, targets, z_loss=0.1), surprise.mean() + 0.1 * (z**2).mean())


@pytest.mark.skipif(not HAS_CHUNKED_LOSS, reason="this torch has no chunked loss")
@pytest.mark.parametrize("tied", [False, True])
def test_the_chunked_loss_is_the_loss(tied: bool):
    model = tiny_model("sdd", tie_embeddings=tied)
    tokens = drawn_tokens(model.config)
    expected = loss_and_gradients(model, tokens)
    model.chunked_loss = True
    torch.testing.assert_close(loss_and_gradients(model, tokens), expected)
    torch.testing.assert_close(
        model(tokens, tokens.roll(-1, 1), reduction="none").mean(), expected[0], rtol=1e-5, atol=1e-6
    )


def test_the_cross_entropy_of_a_step_is_without_its_z_loss():
    model = tiny_model("sdd")
    tokens = drawn_tokens(model.config)
    plain, with_z = (model(tokens, tokens.roll(-1, 1), z_loss=weight, detailed=True) for weight in (0.0, 0.5))
    z_loss = model(tokens).float().logsumexp(-1).square().mean()
    torch.testing.assert_close(with_z.cross_entropy, plain.cross_entropy)
    torch.testing.assert_close(with_z.total, plain.total + 0.5 * z_loss)


@pytest.mark.parametrize("settings", [{"chunked": True}, {"reduction": "none"}])
def test_z_loss_needs_all_logits_and_a_mean(settings: dict):
    x, head = torch.randn(1, 3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="z_loss needs"):
        cross_entropy(x, head, torch.zeros(1, 3, dtype=torch.long), z_loss=1e-4, **settings)


def test_logits_of_bfloat16_weights_are_turned_into_a_float32_loss():
    x, head = torch.randn(1, 3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    targets = torch.tensor([[1, 2, 3]])
    loss, _ = cross_entropy(x, head, targets)
    torch.testing.assert_close(loss, F.cross_entropy((x @ head.T).float()[0], targets[0]))


def test_tied_embeddings_are_the_head():
    model = LanguageModel(tiny_config("sdd", tie_embeddings=True))
    assert model.head_weight is model.embed.weight
    assert "head.weight" not in model.state_dict()
