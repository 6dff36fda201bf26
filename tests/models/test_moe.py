"""The mixture-of-experts layer: equality with its equations, invariances, and what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers_moe import drawn_layer, drawn_model, moe_config, naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdd.kernels.experts import collect, dispatch, grouped_linear, sort_by_expert
from sdd.models import MoEConfig
from sdd.models.moe import MoE, Routing, auxiliary_losses
from sdd.placement import placements

C = 16
#: Experts have no learned scale of gate and up.
FOR_EXPERTS = sorted(placements.keys() - {"ngpt"})


def tokens(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(value: Tensor, layer: MoE, x: Tensor) -> dict[str, Tensor]:
    named = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


@st.composite
def mixtures(draw: st.DrawFn) -> MoEConfig:
    n_experts = draw(st.integers(1, 6))
    return MoEConfig(
        n_experts,
        draw(st.integers(1, n_experts)),
        d_shared=draw(st.sampled_from([0, 7])),
        renormalise=draw(st.booleans()),
    )


@settings(max_examples=20)
@given(mixtures(), st.sampled_from(FOR_EXPERTS), st.integers(1, 9), st.integers(0, 99))
def test_the_layer_is_a_loop_over_tokens_and_experts(moe: MoEConfig, placement: str, n: int, seed: int):
    config = moe_config(placements[placement].replace_eps(0.05), moe)
    layer = drawn_layer(config, seed)
    x, mixed = tokens(n, seed).requires_grad_(), tokens(n, seed + 1)
    y, routing = layer(x[None])
    expected, balance, z_loss = naive(layer, x, config)
    torch.testing.assert_close(y[0], expected)
    torch.testing.assert_close(routing.balance_loss, balance)
    torch.testing.assert_close(routing.z_loss, z_loss)
    auxiliary, _ = auxiliary_losses([routing], replace(moe, balance_loss=0.3, router_z_loss=0.2))
    ours = gradients((y * mixed).sum() + auxiliary, layer, x)
    theirs = gradients((expected * mixed).sum() + 0.3 * balance + 0.2 * z_loss, layer, x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("placement", ["prenorm", "sdd-paper", "sdd-released"])
@pytest.mark.parametrize("d_ff", [4, 18], ids=["kernel", "loop"])
def test_float32_equals_float64_by_kernel_and_by_loop(placement: str, d_ff: int):
    config = moe_config(placement, MoEConfig(5, 2), d_ff=d_ff)
    layer, exact = drawn_layer(config, dtype=torch.float32), drawn_layer(config)
    exact.load_state_dict(layer.state_dict())
    found = {}
    for name, one, x in (("ours", layer, tokens(40, dtype=torch.float32)), ("exact", exact, tokens(40))):
        x.requires_grad_()
        y = one(x[None])[0]
        # a broadcast gradient, whose strides are zero, reaches the products
        found[name] = {"y": y.double()} | {k: v.double() for k, v in gradients(y.sum(), one, x).items()}
    torch.testing.assert_close(found["ours"], found["exact"], rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(st.integers(0, 99))
def test_the_order_of_tokens_and_of_experts_does_not_matter(seed: int):
    config = moe_config("sdd-paper", MoEConfig(6, 3))
    layer = drawn_layer(config, seed)
    x = tokens(8, seed)
    y, routing = layer(x[None])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    other, _ = layer(x[None, order])
    torch.testing.assert_close(other[0], y[0, order])

    experts = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    renamed = drawn_layer(config, seed)
    with torch.no_grad():
        for parameter in renamed.parameters():  # E is the first dimension of all of them
            parameter.copy_(parameter[experts])
    other, other_routing = renamed(x[None])
    torch.testing.assert_close(other, y)
    torch.testing.assert_close(other_routing.counts, routing.counts[experts])


@pytest.mark.parametrize("d_ff", [4, 18], ids=["kernel", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_tokens_on_one_expert_leave_the_others_without_gradient(d_ff: int, dtype: torch.dtype):
    layer = drawn_layer(moe_config("sdd-paper", MoEConfig(4, 1), d_ff=d_ff), dtype=dtype)
    x = tokens(7, dtype=dtype).requires_grad_()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 100 * x[0]
        x[:] = x[0]
    y, routing = layer(x[None])
    assert routing.counts.tolist() == [0, 0, 7, 0]
    assert routing.load.tolist() == [0, 0, 4, 0]
    found = gradients(y.square().sum(), layer, x)
    for name, gradient in found.items():
        if name.split(".")[0] in ("gate_proj", "up_proj", "down_proj"):
            assert gradient[2].abs().min() > 0, name
            assert not gradient[[0, 1, 3]].any(), name


@pytest.mark.parametrize("placement", FOR_EXPERTS)
def test_one_expert_is_the_dense_model(placement: str):
    config = moe_config(placement, MoEConfig(1, 1))
    dense = replace(config, moe=None)
    torch.manual_seed(0)
    one = drawn_model(config)
    other = drawn_model(dense)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(one.get_parameter(name).view_as(parameter))
    batch = torch.randint(config.vocab_size, (2, 13))
    ours = one(batch[:, :-1], batch[:, 1:], detailed=True)
    theirs = other(batch[:, :-1], batch[:, 1:], detailed=True)
    torch.testing.assert_close(ours.cross_entropy, theirs.total.detach())
    weights = config.moe
    assert weights is not None
    z_loss = ours.routing.z_loss.mean()
    torch.testing.assert_close(
        ours.total.detach(), ours.cross_entropy + weights.balance_loss + weights.router_z_loss * z_loss
    )


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 99))
def test_all_experts_are_used_where_k_is_all(n_experts: int, seed: int):
    layer = drawn_layer(moe_config("sdd", MoEConfig(n_experts, n_experts)), seed)
    y, routing = layer(tokens(5, seed)[None])
    assert routing.counts.tolist() == [5] * n_experts
    torch.testing.assert_close(routing.balance_loss, torch.ones((), dtype=torch.float64), check_dtype=False)
    assert y.isfinite().all()


def test_a_router_without_preference_has_the_entropy_of_all_experts():
    layer = drawn_layer(moe_config("sdd", MoEConfig(6, 2)))
    with torch.no_grad():
        layer.router.weight.zero_()
    routing = layer(tokens(5)[None])[1]
    log = torch.tensor(6.0, dtype=torch.float64).log()
    torch.testing.assert_close(routing.entropy, log)
    torch.testing.assert_close(routing.z_loss.detach(), log**2)


def test_losses_are_means_over_layers_and_counts_of_all_processes_replace_those_of_one():
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(3):
        counts = torch.randint(1, 9, (4,), generator=generator, dtype=torch.int32)
        probability = torch.rand(4, generator=generator).requires_grad_()
        layers.append(Routing(counts, probability, torch.rand((), generator=generator), torch.zeros(())))
    config = MoEConfig(4, 2, balance_loss=0.5, router_z_loss=0.25)
    total, _ = auxiliary_losses(layers, config)
    expected = sum(0.5 * r.balance_loss + 0.25 * r.z_loss for r in layers) / 3
    torch.testing.assert_close(total, expected)
    others = torch.tensor([[8, 0, 0, 0]] * 3, dtype=torch.int32)
    total, routing = auxiliary_losses(layers, config, lambda counts: counts + others)
    assert not total.isnan()
    assert not any(value.requires_grad for value in routing)
    for layer, counts in zip(layers, routing.counts, strict=True):
        assert torch.equal(counts, layer.counts + others[0])
    share = routing.counts / routing.counts.sum(-1, keepdim=True)
    balance = 4 * (share * torch.stack([r.probability for r in layers])).sum(-1)
    z_loss = torch.stack([r.z_loss for r in layers])
    torch.testing.assert_close(total, 0.5 * balance.mean() + 0.25 * z_loss.mean())


# --- rows sorted by expert


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    n_experts = draw(st.integers(1, 7))
    k, n = draw(st.integers(1, n_experts)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    # squared: experts without tokens are common
    return torch.rand(n, n_experts, generator=generator).square().topk(k).indices, n_experts


@given(choices())
def test_dispatch_and_collect_are_each_others_transpose_and_drop_nothing(drawn: tuple[Tensor, int]):
    experts, n_experts = drawn
    order = sort_by_expert(experts, n_experts)
    assert order.counts_E.tolist() == [(experts == e).sum().item() for e in range(n_experts)]
    assert torch.equal(order.experts_M, experts.flatten()[order.pairs_M])
    assert torch.equal(order.experts_M, order.experts_M.sort().values)
    x, y = tokens(len(experts)).requires_grad_(), tokens(experts.numel(), 2).requires_grad_()
    rows, sums = dispatch(x, order), collect(y, order)
    assert torch.equal(rows, x[order.tokens_M])
    torch.testing.assert_close(collect(rows, order), x * experts.shape[1])
    torch.testing.assert_close((rows * y).sum(), (x * sums).sum())
    torch.testing.assert_close(torch.autograd.grad(rows, x, y), (sums,))
    torch.testing.assert_close(torch.autograd.grad(sums, y, x), (rows,))


@settings(max_examples=20)
@given(choices(), st.sampled_from([(4, 8), (3, 5), (8, 2)]), st.sampled_from([torch.float32, torch.float64]))
def test_grouped_products_are_those_of_each_expert(
    drawn: tuple[Tensor, int], widths: tuple[int, int], dtype: torch.dtype
):
    experts, n_experts = drawn
    order = sort_by_expert(experts, n_experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(experts.numel(), widths[0], generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(n_experts, widths[1], widths[0], generator=generator, dtype=dtype).requires_grad_()
    dy = torch.randn(experts.numel(), widths[1], generator=generator, dtype=dtype)
    y = grouped_linear(x, weight, order.ends_E)
    expected = torch.einsum("mi,moi->mo", x, weight[order.experts_M])
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, (x, weight), dy)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight), dy))


def test_autocast_reaches_the_products():
    order = sort_by_expert(torch.tensor([[0], [1]]), 2)
    x, weight = torch.randn(2, 8), torch.randn(2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, order.ends_E)
        assert grouped_linear(x.double(), weight.double(), order.ends_E).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def held(n_experts: int, top_k: int) -> int:
    """Bytes that a forward pass keeps for its derivative, parameters not counted."""
    layer = drawn_layer(moe_config("sdd-paper", MoEConfig(n_experts, top_k)), dtype=torch.float32)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(tokens(64, dtype=torch.float32)[None])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_memory_grows_with_the_experts_a_token_uses_and_not_with_their_number():
    assert held(16, 4) > 1.8 * held(16, 2)
    # p, and what the losses keep of the logits, have one number an expert and token
    assert held(16, 2) < held(4, 2) + 64 * 12 * 4 * 4


# --- configs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_experts": 0, "top_k": 0}, "top_k=0 must be between 1 and n_experts=0"),
        ({"n_experts": 2, "top_k": 3}, "top_k=3 must be between 1 and n_experts=2"),
        ({"n_experts": 2, "top_k": 1, "d_shared": -1}, "d_shared=-1"),
        ({"n_experts": 2, "top_k": 1, "balance_loss": float("nan")}, "balance_loss=nan"),
        ({"n_experts": 2, "top_k": 1, "router_z_loss": -0.1}, "router_z_loss=-0.1"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**given)
