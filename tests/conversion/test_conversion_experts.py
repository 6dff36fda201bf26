"""Stacked experts of transformers: against a loop written out, and what travels with them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdd
from sdd.conversion import convert
from sdd.functional import norm

transformers = pytest.importorskip("transformers", minversion="5")

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EPS = 1e-3  # large enough to be seen


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=4))


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TINY, **settings))


def nemotron() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        **{**TINY, "num_hidden_layers": None},
        layers_block_type=["moe", "attention"],
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
    )
    return transformers.NemotronHForCausalLM(config)


MODELS = {"mixtral": mixtral, "gpt-oss": gpt_oss, "nemotron": nemotron}


def experts_of(model: nn.Module) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith(".experts"))


def written_out(module, x: Tensor, chosen: Tensor, weights: Tensor, layout: str) -> Tensor:
    """What each expert gives, one token and expert after another."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            y[token] += weight * one_expert(module, expert, x[token], layout)
    return y


def one_expert(module, e: int, x: Tensor, layout: str) -> Tensor:
    if layout == "mixtral":
        z_gate, z_up = (module.gate_up_proj[e] @ x).chunk(2)
        a_gate, a_up = module.gate_up_proj_alpha[e].chunk(2)
        hidden = F.silu(a_gate * norm(z_gate, EPS)) * (a_up * norm(z_up, EPS))
        return module.down_proj_alpha[e] * norm(module.down_proj[e] @ hidden, EPS)
    if layout == "nemotron":
        hidden = module.act_fn(module.up_proj_alpha[e] * norm(module.up_proj[e] @ x, EPS))
        return module.down_proj_alpha[e] * norm(module.down_proj[e] @ hidden, EPS)
    z, alpha, bias = x @ module.gate_up_proj[e], module.gate_up_proj_alpha[e], module.gate_up_proj_bias[e]
    gate = (alpha[::2] * norm(z[::2], EPS) + bias[::2]).clamp(max=module.limit)
    up = (alpha[1::2] * norm(z[1::2], EPS) + bias[1::2]).clamp(-module.limit, module.limit)
    hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    return module.down_proj_alpha[e] * norm(hidden @ module.down_proj[e], EPS) + module.down_proj_bias[e]


@pytest.mark.parametrize("layout", MODELS)
def test_converted_experts_compute_alpha_norm_v_x(layout: str):
    model = MODELS[layout]().double()
    convert(model, eps=EPS)
    module = experts_of(model)
    for name, parameter in module.named_parameters():
        if name.endswith(("alpha", "bias")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = written_out(module, x, chosen, weights, layout)
    y = module(x, chosen, weights)
    torch.testing.assert_close(y, expected)
    inputs = [x, weights, *module.parameters()]
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, inputs, cotangent)
    for gradient, other in zip(torch.autograd.grad(y, inputs, cotangent), theirs, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_weights_keep_their_names_and_objects(build: Callable[[], nn.Module]):
    model = build()
    before = dict(model.named_parameters())
    report = convert(model)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    stacked = [layer for layer in report.converted if len(layer.shape) == 3]
    assert stacked
    assert {f"{layer.name}_alpha" for layer in stacked} <= after.keys() - before.keys()
    assert all(layer.is_output == layer.name.endswith("down_proj") for layer in stacked)
    assert all((layer.group is not None) == ("gate" in layer.name) for layer in stacked)


def test_one_of_two_matrices_may_be_converted():
    model = mixtral().double()
    convert(model, include=["experts.down_proj"], eps=EPS)
    module = experts_of(model)
    x, chosen, weights = torch.randn(1, 16).double(), torch.tensor([[2, 0]]), torch.tensor([[0.25, 0.75]]).double()
    expected = 0
    for e, weight in ((2, 0.25), (0, 0.75)):
        gate, up = (x @ module.gate_up_proj[e].T).chunk(2, -1)
        down = (F.silu(gate) * up) @ module.down_proj[e].T
        expected = expected + weight * module.down_proj_alpha[e] * norm(down, EPS)
    torch.testing.assert_close(module(x, chosen, weights), expected)


def test_transformers_cannot_switch_the_norms_off():
    """Its exporters and its generation choose another implementation for a while."""
    model = mixtral()
    convert(model)
    tokens = torch.arange(8)[None]
    logits = model(input_ids=tokens).logits
    model.set_experts_implementation("batched_mm")
    assert torch.equal(model(input_ids=tokens).logits, logits)


def test_experts_that_are_spread_over_processes_are_refused():
    model = mixtral()
    convert(model)
    experts_of(model)._is_expert_parallel = True
    with pytest.raises(ValueError, match="expert parallelism"):
        model(input_ids=torch.arange(8)[None])
    model = mixtral()
    experts_of(model)._is_expert_parallel = True
    kept = {layer.name: layer.reason for layer in convert(model).kept}
    assert "spread over processes" in kept["model.layers.0.mlp.experts.down_proj"]


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_computes_the_same(travel):
    model = mixtral()
    convert(model)
    tokens = torch.arange(8)[None]
    twin = travel(model)
    assert torch.equal(twin(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert type(experts_of(twin)) is type(experts_of(model))


def test_alphas_stay_float32_and_are_not_decayed():
    model = mixtral()
    convert(model)
    module = experts_of(model)
    nn.init.uniform_(module.down_proj_alpha, 0.5, 1.5)
    before = module.down_proj_alpha.detach().clone()
    model.bfloat16()
    assert module.down_proj.dtype == torch.bfloat16
    assert torch.equal(module.down_proj_alpha, before)
    alphas = next(group for group in sdd.param_groups(model) if group["role"] == "alpha")
    assert {"model.layers.0.mlp.experts.gate_up_proj_alpha", "model.layers.1.mlp.experts.down_proj_alpha"} <= set(
        alphas["names"]
    )
    assert alphas["weight_decay"] == 0
    loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    assert torch.isfinite(module.down_proj_alpha.grad).all()


def test_reset_parameters_draws_as_the_conversion_does():
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**TINY, "hidden_size": 64}, head_dim=8))
    convert(model, output_alpha_init=0.25)
    module = experts_of(model).to_empty(device="cpu")
    module.reset_parameters()
    std = 0.5 * (2.5 * 64) ** -0.5
    assert module.gate_up_proj.std().item() == pytest.approx(0.9866 * std, rel=0.02)
    assert module.gate_up_proj.abs().max() <= 3 * std
    assert not module.down_proj_bias.any()
    assert (module.down_proj_alpha == 0.25).all()
    assert (module.gate_up_proj_alpha == 1).all()


def test_experts_outside_the_interface_are_named():
    config = transformers.Llama4TextConfig(**TINY, head_dim=8, num_local_experts=4, intermediate_size_mlp=24)
    kept = {layer.name: layer.reason for layer in convert(transformers.Llama4ForCausalLM(config)).kept}
    assert kept["model.layers.0.feed_forward.experts.gate_up_proj"].startswith(
        "stacked matrices of a Llama4TextExperts"
    )


def test_a_converted_mixture_learns():
    model = mixtral()
    convert(model, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(sdd.param_groups(model), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
