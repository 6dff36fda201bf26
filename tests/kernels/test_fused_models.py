"""Whole models whose sites run as fused kernels, against the modules."""

from dataclasses import replace

import pytest
import torch
from helpers_kernels import DEVICE, HAS_TRITON

from sdd import kernels
from sdd.models import LanguageModel, ModelConfig, MoEConfig
from sdd.placement import Norm, Placement, placements
from sdd.probing import Probe

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")

SHAPE = ModelConfig(n_layers=1, d_model=16, d_ff=24, n_heads=4, n_kv_heads=2, vocab_size=29, context=12)
WITH_CTX = Placement({**placements["sdd-prenorm"].norms, "ctx": Norm()}, init="base")
CASES = {**placements, "sdd-prenorm with ctx": WITH_CTX, "joint, no pre-norm": replace(
    placements["sdd-paper"], joint_gate_up=True)}  # fmt: skip


def model_of(placement, **changes):
    """Alphas differ, and matrices are large enough for eps not to count."""
    torch.manual_seed(0)
    model = LanguageModel(replace(SHAPE, placement=placement, **changes), DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.ndim == 1 or name.endswith("alpha")
            factor = 1 + 0.3 * torch.randn_like(parameter) if scale else 2.0
            parameter.mul_(factor)
    return model


def loss_and_gradients(model, path, dtype=None, tokens_seed=1):
    generator = torch.Generator().manual_seed(tokens_seed)
    tokens = torch.randint(0, 29, (2, 4), generator=generator).to(DEVICE)  # interpreted, each row costs
    model.zero_grad()
    with kernels.use(path):
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("name", "eliminate"),
    [*((name, True) for name in CASES), *((name, False) for name in ("sdd-paper", "sdd-released", "sdd-prenorm"))],
)
def test_loss_and_gradients_are_those_of_the_modules(name, eliminate):
    model = model_of(CASES[name], eliminate_norms=eliminate)
    fused, composed = (loss_and_gradients(model, path) for path in ("triton", "composed"))
    for mine, theirs in zip(fused, composed, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "d_shared"), [("sdd-paper", 8), ("sdd-released", 0), ("sdd-prenorm", 0)])
def test_mixtures_of_experts_are_those_of_the_modules(name, d_shared):
    model = model_of(CASES[name], moe=MoEConfig(6, 2, d_shared=d_shared), d_ff=8)
    fused, composed = (loss_and_gradients(model, path) for path in ("triton", "composed"))
    for mine, theirs in zip(fused, composed, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["sdd", "sdd-paper", "sdd-released", "prenorm-qk"])
def test_under_autocast_the_fused_model_is_as_near_to_float32(name):
    model = model_of(CASES[name])
    exact = loss_and_gradients(model, "composed")
    errors = {}
    for path in ("triton", "composed"):
        found = loss_and_gradients(model, path, torch.bfloat16)
        errors[path] = sum((mine - theirs).norm() / theirs.norm() for mine, theirs in zip(found, exact, strict=True))
    # the interpreter cuts bfloat16 off instead of rounding it
    assert errors["triton"] < (1.2 if DEVICE == "cuda" else 2) * errors["composed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdd", "prenorm-qk"])
def test_one_graph_with_the_same_numbers_under_autocast(name):
    """Under torch.compile the operations stay whole; activation checkpointing repeats them."""
    model = model_of(CASES[name])
    eager = loss_and_gradients(model, "triton", torch.bfloat16)
    model.checkpoint_blocks = True
    model.compile(backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(loss_and_gradients(model, "triton", torch.bfloat16), eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_probe_sees_the_sites_that_are_fused():
    model = model_of(CASES["sdd-paper"])
    rows = []
    with Probe(model, every=1, out=rows.append) as probe, probe.step():
        loss_and_gradients(model, "triton")
    sites = rows[0]["sites"]
    for site in ("attn.q_proj", "attn.o_proj", "attn_post", "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"):
        assert {"rms", "grad_rms", "eps_ratio"} <= sites[f"blocks.0.{site}"].keys()


def test_reading_on_with_a_cache_is_the_same():
    from sdd.models import KVCache

    model = model_of(CASES["sdd"]).eval()
    tokens = torch.randint(0, 29, (2, 8)).to(DEVICE)
    with torch.no_grad(), kernels.use("triton"):
        whole, cache = model(tokens), KVCache(model.config, 2)
        pieces = [model(tokens[:, :5], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(5, 8))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
