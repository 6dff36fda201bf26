"""The lean block against its equations: left-out norms change nothing, in float64 and every gradient."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_hook

from sdd import kernels
from sdd.models import LanguageModel, ModelConfig, MoEConfig, lean
from sdd.models.elimination import left_out_norms
from sdd.nn import RMSNorm, SDDLinear
from sdd.placement import Norm, Placement, placements
from sdd.probing import Probe

SHAPE = ModelConfig(n_layers=2, d_model=32, d_ff=48, n_heads=4, n_kv_heads=2, vocab_size=61, context=1024)
EVERY_LINEAR = placements["sdd-prenorm"].norms
#: Each elimination alone and together, v plain and normed, full width and per head, a joint gate|up group.
CASES = {
    "released, v plain": placements["sdd-released"],
    "released, v normed": replace(
        placements["sdd-released"], norms={**placements["sdd-released"].norms, "v": Norm(group="head")}
    ),
    "paper": placements["sdd-paper"],
    "sdd-prenorm": placements["sdd-prenorm"],
    "sdd-prenorm with ctx": Placement({**EVERY_LINEAR, "ctx": Norm()}, init="base"),
    "per head": Placement({**EVERY_LINEAR, **{site: Norm(group="head") for site in "qkv"}}, init="base"),
    "joint": Placement({**EVERY_LINEAR, "ctx": Norm()}, joint_gate_up=True, init="base"),
}
LEFT_OUT = {
    "released, v plain": {"ctx"},
    "released, v normed": {"ctx"},
    "paper": {"up"},
    "sdd-prenorm": {"up", "attn_in", "ffn_in"},
    "sdd-prenorm with ctx": {"up", "attn_in", "ffn_in", "ctx"},
    "per head": {"up", "attn_in", "ffn_in"},
    "joint": {"ctx", "attn_in", "ffn_in"},
}


def pair(config, dtype=torch.float64):
    """The same model by its equations, and lean without the norms that cancel; alphas are no longer ones."""
    torch.manual_seed(0)
    models = [LanguageModel(config).to(dtype) for _ in range(2)]
    for block in models[1].blocks:
        block.force_lean = True
    with torch.no_grad():
        for parameter in models[0].parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize("case", CASES)
def test_which_norms_are_left_out(case):
    config = replace(SHAPE, placement=CASES[case])
    assert left_out_norms(config, 0) == LEFT_OUT[case]
    assert left_out_norms(replace(config, eliminate_norms=False), 0) == frozenset()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("init_scale", [1.0, 0.1])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("tokens", [1, 7, 1024])
def test_outputs_and_every_gradient_are_the_same(case, init_scale, eps, tokens):
    config = replace(SHAPE, placement=CASES[case].replace_eps(eps), init_scale=init_scale)
    kept, left_out = pair(config)
    sample = torch.randint(0, 61, (1, tokens + 1), generator=torch.Generator().manual_seed(1))
    losses = [model(sample[:, :-1], sample[:, 1:]) for model in (kept, left_out)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    largest = max(parameter.grad.abs().max() for parameter in kept.parameters())
    for (name, one), other in zip(kept.named_parameters(), left_out.parameters(), strict=True):
        size = one.grad.abs().max().clamp(min=1e-6 * largest)  # queries of a single token have no gradient
        assert (other.grad - one.grad).abs().max() <= 1e-9 * size, name


#: Residual rules that scale f, with and without a norm on it, and norms with a factor by depth, kept and left out.
FACTORS = {
    "sdd-depth": placements["sdd-depth"],
    "small branches": replace(placements["sdd-prenorm"], residual="x + f/sqrt(2L)"),
    "small plain branches": replace(placements["prenorm"], residual="x + f/sqrt(2L)"),
    "peri-depth": placements["peri-depth"],
    "lns": placements["lns"],
    "keel": placements["keel"],
    "left out with a factor": Placement(
        {**EVERY_LINEAR, "attn_in": Norm(depth_factor="1/sqrt(l)"), "ctx": Norm(depth_factor="1/sqrt(l)")}, init="base"
    ),
}


@pytest.mark.parametrize("case", FACTORS)
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4, top_k=2, d_shared=16)])
def test_factors_of_branches_and_norms_change_nothing(case, moe):
    config = replace(SHAPE, n_layers=3, placement=FACTORS[case], init_scale=0.1, moe=moe)
    equations, fused = pair(config)
    assert all(lean.runs_lean(block, torch.zeros(1, 2, 32)) for block in fused.blocks)
    sample = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    for model in (equations, fused):
        model(sample[:, :-1], sample[:, 1:]).backward()
    for (name, one), other in zip(equations.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_norms_with_a_factor_are_left_out_too():
    config = replace(SHAPE, placement=FACTORS["left out with a factor"])
    assert left_out_norms(config, 1) == {"up", "ctx", "attn_in", "ffn_in"}


@settings(max_examples=20)
@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**31))
def test_in_float32_it_is_the_same_to_rounding(case, seed):
    kept, left_out = pair(replace(SHAPE, placement=CASES[case]), torch.float32)
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(left_out(tokens), kept(tokens), rtol=1e-4, atol=1e-4)


def test_a_training_run_is_the_same():
    """AdamW with decay on everything, also on the alphas that became free of scale."""
    curves = []
    for model in pair(replace(SHAPE, placement=CASES["sdd-prenorm with ctx"], init_scale=0.1)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        generator, losses = torch.Generator().manual_seed(2), []
        for _ in range(15):
            tokens = torch.randint(0, 61, (2, 33), generator=generator)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_keeps_its_norms(autocast):
    config = replace(SHAPE, placement=CASES["sdd-prenorm with ctx"])
    kept, left_out = pair(config, torch.float32 if autocast else torch.float16)
    tokens = torch.randint(0, 61, (1, 16))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert torch.equal(left_out(tokens), kept(tokens))


def test_bfloat16_has_the_range():
    config = replace(SHAPE, placement=CASES["sdd-prenorm with ctx"], init_scale=0.1)
    kept, left_out = pair(config, torch.float32)
    tokens = torch.randint(0, 61, (1, 64))
    exact = kept(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(model(tokens) - exact).square().mean().sqrt() for model in (kept, left_out)]
    assert errors[1] < 1.5 * errors[0]


class Adapted(torch.nn.Module):
    """A low-rank adapter beside a layer, as PEFT wraps it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.beside = layer, torch.nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.beside(x)


@pytest.mark.parametrize("where", ["attn.q_proj", "attn.o_proj", "ffn.up_proj", "ffn.down_proj"])
@pytest.mark.parametrize("how", ["adapter", "hook"])
def test_an_adapter_or_a_hook_keeps_the_norms_around_it(where, how):
    models = pair(replace(SHAPE, placement=CASES["sdd-prenorm with ctx"], init_scale=0.1), torch.float32)
    seen = []
    for model in models:
        torch.manual_seed(3)
        part, name = where.split(".")
        owner = getattr(model.blocks[1], part)
        if how == "adapter":
            setattr(owner, name, Adapted(getattr(owner, name)))
        else:
            getattr(owner, name).register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = torch.randint(0, 61, (1, 16))
    torch.testing.assert_close(models[1](tokens), models[0](tokens), rtol=1e-4, atol=1e-4)
    if how == "hook":
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


def left_out(norms, **changes):
    placement = Placement(norms, joint_gate_up=changes.pop("joint", False), init="base")
    return left_out_norms(replace(SHAPE, placement=placement, **changes), 0)


def test_a_router_a_joint_group_or_heads_keep_the_norm():
    assert "ffn_in" in left_out(EVERY_LINEAR)
    assert "ffn_in" not in left_out(EVERY_LINEAR, moe=MoEConfig(4, 2))
    assert "up" not in left_out(EVERY_LINEAR, joint=True)
    assert "ctx" not in left_out({**EVERY_LINEAR, "ctx": Norm(group="head")})


@pytest.mark.parametrize(
    ("plain", "kept"), [("v", "attn_in"), ("gate", "ffn_in"), ("ffn_out", "up"), ("attn_out", "ctx")]
)
def test_a_plain_reader_keeps_the_norm(plain, kept):
    norms = {**EVERY_LINEAR, "ctx": Norm()}
    assert kept in left_out(norms)
    del norms[plain]
    assert kept not in left_out(norms)


@pytest.mark.parametrize("name", ["prenorm", "prenorm-qk", "postnorm", "olmo2", "peri", "hybrid", "qkv-norm", "sdd"])
def test_other_placements_keep_all_their_norms(name):
    assert left_out_norms(replace(SHAPE, placement=placements[name]), 0) == frozenset()


def test_it_matters_that_eps_is_taken_along(monkeypatch):
    """With the consumer's eps as it stands, small init scales would give another function."""
    config = replace(SHAPE, placement=CASES["released, v plain"].replace_eps(1e-6), init_scale=0.1)
    kept, left_out = pair(config)
    tokens = torch.randint(0, 61, (1, 128))
    product = lean.product
    monkeypatch.setattr(lean, "product", lambda layer, read: product(layer, read._replace(s2=None)))
    assert (left_out(tokens) - kept(tokens)).norm() / kept(tokens).norm() > 0.01


# --- every placement, and who decides ---


@pytest.mark.parametrize("path", ["composed", "recompute"])
@pytest.mark.parametrize("name", placements)
@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, d_shared=8)], ids=["dense", "moe"])
def test_lean_is_the_same_function_for_every_placement(name, path, moe):
    if moe and name == "ngpt":
        pytest.skip("experts refuse its scales")
    kept, lean_model = pair(replace(SHAPE, placement=placements[name], moe=moe))
    sample = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (kept, lean_model):
        with kernels.use(path):
            loss = model(sample[:, :-1], sample[:, 1:])
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-13)


def test_blocks_built_by_us_run_lean():
    _, model = pair(SHAPE)
    assert all(lean.runs_lean(block, torch.zeros(1, 2, 32)) for block in model.blocks)


def spoil_hook(block):
    block.ffn.gate_proj.register_forward_hook(lambda module, args, output: None)


def spoil_adapter(block):
    block.attn.v_proj = Adapted(block.attn.v_proj)


def spoil_norm(block):
    block.attn_post = torch.nn.LayerNorm(32)


def spoil_norm_by_its_like(block):
    block.attn_post = RMSNorm(32)


def spoil_layer_by_its_like(block):
    block.ffn.down_proj = torch.nn.Linear(48, 32, bias=True)


def spoil_forward(block):
    forward = block.attn.forward
    block.attn.forward = lambda *args: 2 * forward(*args)


def spoil_bias(block):
    block.ffn.gate_proj.bias = torch.nn.Parameter(torch.ones(48))


def spoil_class(block):
    block.attn.v_proj.__class__ = type("Other", (torch.nn.Linear,), {})


SPOILERS = [
    spoil_hook,
    spoil_adapter,
    spoil_forward,
    spoil_bias,
    spoil_norm,
    spoil_norm_by_its_like,
    spoil_layer_by_its_like,
    spoil_class,
]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_what_lean_does_not_know_sends_its_block_to_the_equations(spoil):
    _, model = pair(SHAPE)
    spoil(model.blocks[0])
    assert [lean.runs_lean(block, torch.zeros(1, 2, 32)) for block in model.blocks] == [False, True]


def test_a_hook_on_all_modules_sends_every_block_to_the_equations():
    _, model = pair(SHAPE)
    seen = []
    with register_module_forward_hook(lambda module, args, output: seen.append(type(module))):
        model(torch.randint(0, 61, (1, 4)))
    assert seen.count(SDDLinear) == 2 * 4  # q, k, o and down of two blocks


def test_a_copy_of_a_model_runs_lean():
    _, model = pair(SHAPE)
    copied = copy.deepcopy(model)
    assert all(lean.runs_lean(block, torch.zeros(1, 2, 32)) for block in copied.blocks)


def test_a_recording_probe_sends_every_block_to_the_equations():
    _, model = pair(SHAPE)
    seen = []
    with Probe(model, every=1, out=lambda row: None) as probe, probe.step():
        seen += [lean.runs_lean(block, torch.zeros(1, 2, 32)) for block in model.blocks]
    assert seen == [False, False]
    assert lean.runs_lean(model.blocks[0], torch.zeros(1, 2, 32))


@pytest.mark.parametrize(
    ("norm", "runs"), [(Norm(), True), (Norm(scale=False), False), (Norm(depth_factor="1/sqrt(l)"), True)]
)
def test_norms_without_a_scale_run_by_the_equations(norm, runs):
    _, model = pair(replace(SHAPE, placement=Placement({"attn_in": norm, "ffn_in": Norm(), "final": Norm()})))
    assert lean.runs_lean(model.blocks[1], torch.zeros(1, 2, 32)) == runs
