"""Language models of experts: counts, FLOPs, initial weights, compiled, checkpointed, decoding, probed."""

import math
import re
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers_models import drawn_tokens
from helpers_moe import drawn_model, moe_config
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdd import Probe, kernels, param_groups
from sdd.models import KVCache, LanguageModel, ModelConfig, MoEConfig, count_parameters, model_presets
from sdd.models.flops import training_flops
from sdd.nn import ExpertLinear, SDDExpertLinear
from sdd.placement import Norm, Placement, placements

BATCH = 2
MOE = MoEConfig(4, 2, d_shared=6)


@pytest.mark.parametrize(
    ("name", "active", "total", "routers"),
    [
        # as the labels count: 588M tied and without routers, 1.3B and 6.9B untied and with them
        ("moe-588m-3b", 588_357_632, 3_406_929_920, False),
        ("moe-1b-7b", 1_281_785_856, 6_918_930_432, True),
    ],
)
def test_published_labels(name: str, active: int, total: int, routers: bool):
    config = model_presets[name]
    assert config.moe is not None
    L, C, F, E, k = config.n_layers, config.d_model, config.d_ff, config.moe.n_experts, config.moe.top_k
    ends = config.vocab_size * C * (1 if config.tie_embeddings else 2)
    router = C * E if routers else 0
    assert active == ends + L * (4 * C * C + k * 3 * C * F + router)
    assert total == ends + L * (4 * C * C + E * 3 * C * F + router)
    count = count_parameters(config)
    left_out = 0 if routers else count.routers
    assert (count.published_active - left_out, count.published - left_out) == (active, total)
    assert count.routers == L * C * E


def test_as_many_active_parameters_as_nano_but_for_the_router():
    sparse, dense = count_parameters(model_presets["moe-nano"]), count_parameters(model_presets["nano"])
    assert sparse.published_active - sparse.routers == dense.published_active == dense.published


@pytest.mark.parametrize("name", ["prenorm", "sdd", "sdd-paper"])
def test_every_parameter_is_counted_once(name: str):
    config = moe_config(name, MOE)
    count = count_parameters(config)
    model = LanguageModel(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    used = count_parameters(replace(config, moe=replace(MOE, n_experts=2)))
    # an expert less is its matrices, its alphas and its row of the router less
    assert count.active == used.total + 3 * 2 * config.d_model
    assert count.scales == sum(p.numel() for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("alpha"))


def counted(config: ModelConfig, checkpoint_blocks: bool) -> int:
    model = LanguageModel(config)
    model.checkpoint_blocks = checkpoint_blocks
    tokens = drawn_tokens(config, batch=BATCH)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("name", ["prenorm", "sdd-paper", "sdd-released"])
def test_flops_are_those_of_the_experts_a_token_uses(name: str, shared: int):
    config = moe_config(name, replace(MOE, d_shared=shared))
    tokens = BATCH * config.context
    assert counted(config, False) == tokens * training_flops(config).model
    assert counted(config, True) == tokens * training_flops(config, checkpoint_blocks=True).hardware


@pytest.mark.parametrize("rule", ["base", "megatron", "deepnorm"])
def test_each_expert_is_drawn_as_a_dense_matrix_is(rule):
    config = moe_config(replace(placements["sdd"], init=rule), MoEConfig(3, 1), d_model=192, d_ff=320, init_scale=0.5)
    torch.manual_seed(0)
    model = LanguageModel(config)
    base, output = (2.5 * 192) ** -0.5, (2.5 * 192 * 2 * 3) ** -0.5
    xavier, gain = math.sqrt(2 / (192 + 320)), (8 * 3) ** -0.25
    expected = {
        "base": (base, base, base),
        "megatron": (base, base, output),
        "deepnorm": (xavier, gain * xavier, gain * xavier),
    }[rule]
    router = {"deepnorm": math.sqrt(2 / (192 + 3))}.get(rule, base)
    truncated = 0.98658  # std of a standard normal cut at 3
    for block in model.blocks:
        for layer, std in zip((block.ffn.gate_proj, block.ffn.up_proj, block.ffn.down_proj), expected, strict=True):
            for matrix in layer.weight:
                assert matrix.std().item() == pytest.approx(0.5 * std * truncated, rel=0.02)
                assert matrix.abs().max() <= 3 * 0.5 * std * (1 + 1e-6)
        assert block.ffn.router.weight.std().item() == pytest.approx(0.5 * router * truncated, rel=0.15)


def test_alphas_start_where_the_placement_says_and_do_not_decay():
    factor = Norm(alpha_init="1/sqrt(2L)", alpha_factor=8.0)  # what the released code does by 512 / 64
    placement = Placement({**placements["sdd-paper"].norms, "ffn_out": factor})
    model = LanguageModel(moe_config(placement, MOE, n_layers=2))
    for block in model.blocks:
        assert isinstance(block.ffn.gate_proj, SDDExpertLinear)
        assert block.ffn.gate_proj.alpha.shape == (4, 18)
        assert set(block.ffn.gate_proj.alpha.flatten().tolist()) == {1.0}
        assert set(block.ffn.down_proj.alpha.flatten().tolist()) == {4.0}
    decay = {id(p): group["weight_decay"] for group in param_groups(model, 0.3) for p in group["params"]}
    for module in model.modules():
        if isinstance(module, SDDExpertLinear):
            assert decay[id(module.alpha)] == 0
        if isinstance(module, ExpertLinear):
            assert decay[id(module.weight)] == 0.3


def loss_and_gradients(model: torch.nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_blocks_have_the_same_loss_and_gradients():
    model = drawn_model(moe_config("sdd-paper", MOE))
    tokens = drawn_tokens(model.config)
    kept = loss_and_gradients(model, tokens)
    model.checkpoint_blocks = True
    torch.testing.assert_close(loss_and_gradients(model, tokens), kept, rtol=0, atol=0)


# torch.compile itself makes an instance of each autograd function that it traces
@pytest.mark.ties
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "d_ff", "dtype"),
    [("sdd-paper", 4, torch.float32), ("sdd-released", 18, torch.float64)],
    ids=["float32", "float64"],
)
def test_a_compiled_model_has_the_same_loss_and_gradients(name: str, d_ff: int, dtype: torch.dtype):
    model = drawn_model(moe_config(name, MOE, d_ff=d_ff, n_layers=1), dtype=dtype)
    tokens = drawn_tokens(model.config)
    eager = loss_and_gradients(model, tokens)
    model.compile(backend="aot_eager", fullgraph=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(loss_and_gradients(model, tokens), eager, **tolerance)


@pytest.mark.ties
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_adds_rows_in_a_fixed_order():
    """Inductor would make `index_add_` and its like atomic additions."""
    found: list[str] = []

    def record(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model = drawn_model(moe_config("sdd-paper", MOE, n_layers=1), dtype=torch.float32)
    model.compile(backend=aot_autograd(fw_compiler=record), fullgraph=True)
    loss_and_gradients(model, drawn_tokens(model.config))
    assert "sdd.expert_sums.default" in found
    assert not [name for name in found if re.search("index_add|scatter_add|scatter_reduce", name)]


@pytest.mark.parametrize("name", ["sdd-paper", "sdd-prenorm"])
def test_norms_left_out_change_nothing(name: str):
    """The router reads what ffn_in gives, so that one stays."""
    config = moe_config(placements[name].replace_eps(0.05), MOE)
    lean, full = drawn_model(config), drawn_model(config)
    for block in lean.blocks:
        assert block.left_out & {"up", "ffn_in"} == {"up"}
        block.force_lean = True
    tokens = drawn_tokens(config)
    torch.testing.assert_close(loss_and_gradients(lean, tokens), loss_and_gradients(full, tokens))


def test_tokens_that_are_read_one_by_one_get_the_same_logits():
    model = drawn_model(moe_config("sdd", MOE)).eval()
    tokens = drawn_tokens(model.config)
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(model.config, len(tokens))
        steps = [model(tokens[:, t : t + 1], cache=cache) for t in range(tokens.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_evaluation_has_no_auxiliary_losses():
    model = drawn_model(moe_config("sdd", replace(MOE, balance_loss=9.0)))
    tokens = drawn_tokens(model.config)
    training = model(tokens, tokens)
    per_token = model(tokens, tokens, reduction="none")
    torch.testing.assert_close(model.eval()(tokens, tokens), per_token.mean())
    assert training > per_token.mean() + 8


@pytest.mark.parametrize("name", ["sdd-paper", "sdd-released"])
def test_a_probe_sees_the_experts_as_sites(name: str):
    torch.manual_seed(0)
    model = LanguageModel(moe_config(name, MOE))
    tokens = drawn_tokens(model.config)
    found = []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Probe(model, every=1, out=found.append) as probe, probe.step(optimizer, 1):
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
    (row,) = found
    for site in ("gate_proj", "up_proj", "down_proj"):
        stats = row["sites"][f"blocks.0.ffn.{site}"]
        assert {"rms", "grad_rms", "eps_ratio", "weight_norm", "alpha_norm", "alpha_grad_rms", "angle"} <= stats.keys()
    width = math.sqrt(4 * 18)
    assert row["sites"]["blocks.0.ffn.gate_proj"]["alpha_norm"] == pytest.approx(width, rel=1e-3)
    if name == "sdd-paper":
        assert row["sites"]["blocks.0.ffn.gate_proj"]["rms"] == pytest.approx(1, rel=0.05)


def test_routing_is_the_second_output_that_a_hook_sees():
    model = drawn_model(moe_config("sdd", MOE))
    seen = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda _module, _args, output: seen.append(output[1]))
    tokens = drawn_tokens(model.config)
    loss = model(tokens, tokens, detailed=True)
    assert [routing.counts.tolist() for routing in seen] == loss.routing.counts.tolist()
    assert loss.routing.counts.sum(-1).tolist() == [tokens.numel() * MOE.top_k] * len(model.blocks)


def test_composed_and_recomputed_paths_agree():
    model = drawn_model(moe_config("sdd-paper", MOE))
    tokens = drawn_tokens(model.config)
    with kernels.use("composed"):
        composed = loss_and_gradients(model, tokens)
    torch.testing.assert_close(loss_and_gradients(model, tokens), composed)
