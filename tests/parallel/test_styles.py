"""Styles on layers and on foreign models, against one process."""

import pytest
import torch
from helpers_processes import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import sdd
from sdd.errors import UserError
from sdd.functional import norm, scaled_norm
from sdd.kernels import use
from sdd.parallel import ColwiseSDD, RowwiseSDD, ShardedNorm, sharded_norm, sharded_scaled_norm
from sdd.parallel.exchange import gathered, joined, part_of, scattered, summed

B, T, C, F = 2, 6, 8, 24
SHAPES = [(B, T, F), (F,), (F,), (B, T, F)]


def mesh_of(size):
    return init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# --- the norm


def norm_of_parts(rank, size):
    """Errors of a sharded norm, its gradients and what it exchanges."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, errors = mesh_of(size), {}
    for dtype in (torch.float64, torch.float32):
        z, alpha, bias, g = (drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES))
        z[0, 0] *= 1e-3  # eps bends the norm here
        one = [each.clone().requires_grad_() for each in (z, alpha, bias)]
        (scaled_norm(*one, eps=1e-3) * g).sum().backward()
        parts = [part_of(each, mesh, -1).clone().requires_grad_() for each in (z, alpha, bias)]
        with CommDebugMode() as exchanged:
            y = sharded_scaled_norm(*parts, mesh=mesh, eps=1e-3)
            (y * part_of(g, mesh, -1)).sum().backward()
        errors[str(dtype)] = max(
            (part_of(a.grad, mesh, -1) - b.grad).abs().max().item() for a, b in zip(one, parts, strict=True)
        )
        errors[f"{dtype} y"] = (part_of(scaled_norm(*one, eps=1e-3), mesh, -1) - y).abs().max().item()
        assert sum(exchanged.get_comm_counts().values()) == 2, "one all-reduce forward, one backward"
    half = drawn(B, F, dtype=torch.float32).bfloat16()
    errors["bfloat16"] = (
        (part_of(norm(half), mesh, -1) - sharded_norm(part_of(half, mesh, -1), mesh)).abs().max().item()
    )
    return errors


@pytest.mark.parametrize("size", [2, 4])
def test_a_sharded_norm_is_that_of_all_features(size):
    for errors in in_processes(size, norm_of_parts, size):
        assert errors["torch.float64"] < 1e-12
        assert errors["torch.float64 y"] < 1e-14
        assert errors["torch.float32"] < 2e-5
        assert errors["torch.float32 y"] < 1e-6
        assert errors["bfloat16"] < 1e-6, "statistics are float32"


# --- layers


def pair(kind, **options):
    """An up and a down projection, with drawn alphas."""
    torch.manual_seed(1)
    up, down = kind(C, F, dtype=torch.float64, **options), kind(F, C, dtype=torch.float64)
    for layer in (up, down):
        if isinstance(layer, sdd.SDDLinear):
            nn.init.uniform_(layer.alpha, 0.5, 2.0)
    return nn.Sequential(up, nn.SiLU(), down)


PAIRS = {
    "full": (sdd.SDDLinear, {}),
    "heads": (sdd.SDDLinear, {"group": 6}),
    "shared alpha": (sdd.SDDLinear, {"group": 6, "shared_alpha": True}),
    "no alpha, no bias": (sdd.SDDLinear, {"scale": False, "bias": False}),
    "plain": (nn.Linear, {}),
}


def pairs_of_layers(rank, size):
    """The largest relative error of outputs and gradients of each pair, with and without shared tokens."""
    mesh, found = mesh_of(size), {}
    x, g = drawn(B, 4, C, seed=3), drawn(B, 4, C, seed=4)
    for name, (kind, options) in PAIRS.items():
        alone = pair(kind, **options)
        one = x.clone().requires_grad_()
        expected = alone(one)
        expected.backward(g)
        for tokens in (False, True):
            layout = Shard(1) if tokens else Replicate()
            plan = {"0": ColwiseSDD(input_layouts=layout), "2": RowwiseSDD(output_layouts=layout)}
            shared = parallelize_module(pair(kind, **options), mesh, plan)
            mine = (part_of(x, mesh, 1) if tokens else x).clone().requires_grad_()
            y = shared(mine)
            y.backward(part_of(g, mesh, 1) if tokens else g)
            pairs = [(expected, y), (one.grad, mine.grad)]
            pairs = [(part_of(a, mesh, 1) if tokens else a, b) for a, b in pairs]
            for (key, p), q in zip(alone.named_parameters(), shared.parameters(), strict=True):
                assert q.grad is not None, key
                pairs.append((p.grad, whole(q.grad)))
            found[name, tokens] = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    return found


def test_a_pair_of_cut_layers_computes_what_whole_ones_do():
    for found in in_processes(2, pairs_of_layers, 2):
        assert len(found) == 2 * len(PAIRS)
        assert max(found.values()) < 1e-12, found


def sharded_twice(rank):
    """A pair of layers that FSDP2 shards further, over rows of the batch; and kernels on parts of the features."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    data = mesh["shard"].get_local_rank()
    x, g = drawn(2, B, C, seed=3), drawn(2, B, C, seed=4)
    alone = pair(sdd.SDDLinear)
    (alone(x) * g).sum().div(2).backward()  # FSDP2 takes the mean over processes
    shared = parallelize_module(pair(sdd.SDDLinear), mesh["tensor"], {"0": ColwiseSDD(), "2": RowwiseSDD()})
    fully_shard(shared, mesh=mesh["shard"])
    assert shared[0].weight.placements[1].is_shard()
    assert shared[0].weight.to_local().numel() == C * F // 4
    (shared(x[data]) * g[data]).sum().backward()
    pairs = [(p.grad, q.grad.full_tensor()) for p, q in zip(alone.parameters(), shared.parameters(), strict=True)]
    error = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    layer = pair(sdd.SDDLinear, group=6)[0].float()
    expected = layer(x.float())
    with use("triton"):
        found = parallelize_module(layer, mesh["tensor"], ColwiseSDD())(x.float())
    return error, (part_of(expected, mesh["tensor"], -1) - found).abs().max().item()


def test_fsdp_shards_cut_layers_further_and_kernels_run_on_parts():
    for error, kernel_error in in_processes(4, sharded_twice):
        assert error < 1e-12
        assert kernel_error < 1e-5


# --- what is refused


def refusals(rank, size):
    mesh = mesh_of(size)
    said = []
    for layer, style in (
        (sdd.SDDLinear(C, 9), ColwiseSDD()),
        (sdd.SDDLinear(9, C), RowwiseSDD()),
        (sdd.SDDLinear(C, 24, group=8), ColwiseSDD()),
        (sdd.SDDLinear(C, 24, group=[(16, 8), (8, 0)]), ColwiseSDD()),
        (nn.Conv1d(2, 2, 1), RowwiseSDD()),
        (nn.LayerNorm(8), ShardedNorm()),
    ):
        try:
            parallelize_module(layer, mesh, style)
        except UserError as error:
            said.append(str(error))
    for style in (ColwiseSDD(), RowwiseSDD()):
        layer = parallelize_module(sdd.SDDLinear(C, C), mesh, style)
        try:
            layer(torch.zeros(2, C), added=torch.zeros(2, C))
        except UserError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_cut_is_refused_in_a_line():
    (said, _) = in_processes(2, refusals, 2)
    expected = [
        "2 processes do not divide out_features=9",
        "2 processes do not divide in_features=9",
        "2 processes do not divide the 3 heads",
        "a fused projection is not cut",
        "not Conv1d",
        "a LayerNorm computes something else",
        *["an adapter does not fit a layer that processes share"] * 2,
    ]
    assert len(said) == len(expected)
    for line, text in zip(said, expected, strict=True):
        assert text in line
        assert "\n" not in line


# --- exchanges


def exchanges(rank, size):
    """Gradients of one loss through each exchange, against the same loss computed whole."""
    mesh = mesh_of(size)
    x = drawn(4, 4).requires_grad_()
    weights = drawn(size, 4, 4, seed=9)  # each process uses a tensor for another purpose
    one = (x.square().unsqueeze(0) * weights).sum()
    (expected,) = torch.autograd.grad(one, x)
    mine = part_of(x.detach(), mesh, 0).clone().requires_grad_()
    loss = summed((gathered(mine.square(), mesh, 0) * weights[rank]).sum(), mesh)
    loss.backward()
    assert torch.allclose(loss, one)
    assert torch.allclose(mine.grad, part_of(expected, mesh, 0))
    other = part_of(x.detach(), mesh, 0).clone().requires_grad_()
    (joined(other, mesh, 0).square() * weights[0]).sum().backward()  # the same on all
    assert torch.allclose(other.grad, part_of(2 * x.detach() * weights[0], mesh, 0))
    summand = weights[rank].clone().requires_grad_()
    kept = scattered(summand, mesh, 0)
    assert torch.allclose(kept, part_of(weights.sum(0), mesh, 0))
    summed((kept * part_of(x.detach(), mesh, 0)).sum(), mesh).backward()
    assert torch.allclose(summand.grad, x.detach())
    return True


def test_exchanges_have_the_gradients_of_the_one_loss():
    assert all(in_processes(2, exchanges, 2))


# --- foreign models


def llama(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "eager",
    }
    config, cls = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    }[kind]
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).double().eval()
    sdd.convert(model, mode="reinit")
    return model


def plan_of(model, kind):
    plan = {}
    for index in range(len(model.model.layers)):
        at = f"model.layers.{index}"
        plan |= {f"{at}.self_attn.{name}_proj": ColwiseSDD() for name in "qkv"}
        plan |= {f"{at}.mlp.{name}_proj": ColwiseSDD() for name in ("gate", "up")}
        plan |= {f"{at}.{name}": RowwiseSDD() for name in ("self_attn.o_proj", "mlp.down_proj")}
        if kind == "olmo2":
            plan |= {f"{at}.self_attn.{name}_norm": ShardedNorm() for name in "qk"}
    return plan


def foreign(rank, kind):
    """The largest relative error of logits and gradients; what one process too many is told."""
    mesh = mesh_of(2)
    tokens = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(3))
    alone, shared = llama(kind), llama(kind)
    shared = parallelize_module(shared, mesh, plan_of(shared, kind))
    sdd_layers = sum(isinstance(module, sdd.SDDLinear) for module in shared.modules())
    one, two = (model(tokens).logits for model in (alone, shared))
    for logits in (one, two):
        logits.logsumexp(-1).square().sum().backward()
    pairs = [(one, two)]
    pairs += [(p.grad, whole(q.grad)) for p, q in zip(alone.parameters(), shared.parameters(), strict=True)]
    return sdd_layers, max(((a - b).norm() / a.norm()).item() for a, b in pairs)


# the norms of Olmo2 that take cut features are float32 there, whatever the model
@pytest.mark.parametrize(("kind", "near"), [("llama", 1e-10), ("olmo2", 1e-5)])
def test_a_converted_model_of_transformers_is_cut_by_the_same_styles(kind, near):
    pytest.importorskip("transformers")
    for sdd_layers, error in in_processes(2, foreign, kind):
        assert sdd_layers >= 2 * 4
        assert error < near
