"""Trained stacked experts: calibrated against least squares written out, observed, and put back."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sdd
from sdd import convert, revert
from sdd.conversion.expert_fits import FEW, SPARE
from sdd.errors import UserError
from sdd.functional import norm

transformers = pytest.importorskip("transformers", minversion="5")

EPS = 1e-4
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SHAPES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "decoder_sparse_step": 1,
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def build(kind: str, seed: int = 0, **changes) -> nn.Module:
    """A model with weights as large as trained ones, and biases."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **SHAPES[kind], **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")  # the others take no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.normal_(std=0.3)
    return model


def experts_of(model: nn.Module, layer: int = 0) -> nn.Module:
    return [module for name, module in model.named_modules() if name.endswith(".experts")][layer]


class Alone(nn.Module):
    """The experts of a model, with routing as an input."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, chosen, weights)


def alone(kind: str = "Mixtral", seed: int = 0) -> Alone:
    return Alone(experts_of(build(kind, seed))).double()


def routed(seed: int, n_tokens: int, experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, 16, generator=generator, dtype=torch.float64)
    x = x * torch.rand(n_tokens, 1, generator=generator, dtype=torch.float64).mul(3).exp()
    chosen = torch.rand(n_tokens, experts, generator=generator).argsort(-1)[:, :2]
    return x, chosen, torch.rand(n_tokens, 2, generator=generator, dtype=torch.float64)


def halves(kind: str, z: Tensor) -> tuple[Tensor, ...]:
    """Gate and up."""
    return (z[..., 0::2], z[..., 1::2]) if kind == "GptOss" else z.chunk(2, -1)


def whole(kind: str, parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(parts, -1).flatten(-2) if kind == "GptOss" else torch.cat(parts, -1)


def solved(z: Tensor, u: Tensor) -> Tensor:
    """Alpha of one norm group, each output by itself, by torch.linalg."""
    w = u.square().mean(-1, keepdim=True).rsqrt()
    features, targets = (w * norm(z, EPS)).T.unsqueeze(-1), (w * u).T.unsqueeze(-1)
    return torch.linalg.lstsq(features, targets).solution.flatten()


def matrix(module, key: str, e: int) -> Tensor:
    weight = getattr(module, key)[e]
    return weight.T if module.is_transposed else weight


def bias(module, key: str, e: int) -> Tensor | float:
    return getattr(module, f"{key}_bias")[e] if module.has_bias else 0.0


def by_hand(kind: str, module, e: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha of gate|up and of down of one expert, from its tokens."""
    z = x @ matrix(module, "gate_up_proj", e).T
    alpha = whole(kind, tuple(solved(part, part) for part in halves(kind, z)))
    y = whole(kind, tuple(a * norm(part, EPS) for a, part in zip(halves(kind, alpha), halves(kind, z), strict=True)))
    hidden, true = (module._apply_gate(value + bias(module, "gate_up_proj", e)) for value in (y, z))
    down = matrix(module, "down_proj", e).T
    return alpha, solved(hidden @ down, true @ down)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", SHAPES)
def test_alphas_are_the_least_squares_solution_of_each_experts_tokens(kind: str, seed: int):
    model = alone(kind, seed)
    plain, batches = copy.deepcopy(model.experts), [routed(seed, 150), routed(seed + 9, 120)]
    report = convert(model, mode="calibrate", batches=batches, eps=EPS)
    assert {layer.name for layer in report.converted} == {"experts.gate_up_proj", "experts.down_proj"}
    assert not any(layer.calibration.few for layer in report.converted)
    for e in range(4):
        x = torch.cat([x[(chosen == e).any(-1)] for x, chosen, _ in batches])
        gate_up, down = by_hand(kind, plain, e, x)
        torch.testing.assert_close(model.experts.gate_up_proj_alpha[e].detach(), gate_up)
        torch.testing.assert_close(model.experts.down_proj_alpha[e].detach(), down)


def test_targets_are_of_the_same_tokens_though_the_models_route_differently():
    """The second layer's experts, with inputs of the converted prefix and targets from the original's hidden states."""
    model, tokens = build("Mixtral").double(), torch.randint(32, (16, 30), generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(model)
    convert(model, mode="calibrate", batches=[{"input_ids": part} for part in tokens.split(4)], eps=EPS)
    new, old = (called(one, tokens) for one in (model, plain))
    chosen = new[1]
    assert not torch.equal(chosen, old[1])  # else the test shows nothing
    module, true = experts_of(plain, 1), experts_of(model, 1)
    for e in range(4):
        own = (chosen == e).any(-1)
        z, u = (x[own] @ module.gate_up_proj[e].T for x in (new[0], old[0]))
        gate_up = torch.cat([solved(*pair) for pair in zip(halves("Mixtral", z), halves("Mixtral", u), strict=True)])
        torch.testing.assert_close(true.gate_up_proj_alpha[e].detach(), gate_up, rtol=1e-4, atol=1e-4)


def called(model: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    """What the second layer's experts are called with."""
    seen = []
    handle = experts_of(model, 1).register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", SHAPES)
def test_padding_is_not_among_the_pairs_of_token_and_expert(kind: str):
    model = build(kind)
    tokens = torch.randint(32, (4, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[:, 30:] = 0
    report = convert(model, mode="calibrate", batches=[{"input_ids": tokens, "attention_mask": mask}])
    stacks = [layer for layer in report.converted if len(layer.shape) == 3]
    assert len(stacks) == 4
    assert all(layer.calibration.tokens == 2 * mask.sum() for layer in stacks)


def test_an_expert_with_few_tokens_is_fitted_on_its_layers_and_named():
    model = alone()
    plain, (x, chosen, weights) = copy.deepcopy(model.experts), routed(0, SPARE, experts=3)
    chosen[:5, 0] = torch.where((chosen[:5] == 2).any(-1), chosen[:5, 0], 2)
    assert not (chosen == 3).any()
    report = convert(model, mode="calibrate", batches=[(x, chosen, weights)], eps=EPS)
    assert all(layer.calibration.few == (3,) for layer in report.converted)
    assert f"1 experts saw fewer than {FEW} tokens (3 of experts)" in str(report)
    gate_up, down = by_hand("Mixtral", plain, 3, x)
    torch.testing.assert_close(model.experts.gate_up_proj_alpha[3].detach(), gate_up)
    torch.testing.assert_close(model.experts.down_proj_alpha[3].detach(), down)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_error_is_the_median_over_all_pairs_of_the_stack(kind: str):
    model, (x, chosen, weights) = alone(kind), routed(0, 200)
    plain = copy.deepcopy(model.experts)
    report = convert(model, mode="calibrate", batches=[(x, chosen, weights)], eps=EPS)
    errors = []
    for e in range(4):
        z = x[(chosen == e).any(-1)] @ matrix(plain, "gate_up_proj", e).T
        n = whole(kind, tuple(norm(part, EPS) for part in halves(kind, z)))
        errors.append((model.experts.gate_up_proj_alpha[e] * n - z).norm(dim=-1) / z.norm(dim=-1))
    assert report.converted[0].calibration.error == pytest.approx(torch.cat(errors).median().item(), rel=1e-5)


def test_a_pair_of_weight_zero_does_not_count():
    """Some models send a token that skips its expert to the first one, with weight 0."""
    model, (x, chosen, weights) = alone(), routed(0, 200)
    weights[chosen == 0] = weights[chosen == 0] * (torch.arange(int((chosen == 0).sum())) % 2)
    plain, own = copy.deepcopy(model.experts), ((chosen == 0) & (weights != 0)).any(-1)
    report = convert(model, mode="calibrate", batches=[(x, chosen, weights)], eps=EPS)
    assert report.converted[0].calibration.tokens == (weights != 0).sum()
    torch.testing.assert_close(model.experts.gate_up_proj_alpha[0].detach(), by_hand("Mixtral", plain, 0, x[own])[0])


def sequences(seed: int, n: int = 32) -> Tensor:
    """Each token follows from the last one by a rule of its sequence, but for one in twenty."""
    generator = torch.Generator().manual_seed(seed)
    step, tokens = (torch.randint(low, high, (n, 1), generator=generator) for low, high in ((1, 4), (0, 32)))
    rows = [tokens]
    for _ in range(23):
        rows.append((rows[-1] * step + step) % 32)
    whole = torch.cat(rows, 1)
    noise = torch.rand(whole.shape, generator=generator) < 0.05
    return torch.where(noise, torch.randint(32, whole.shape, generator=generator), whole)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_trained_mixture_keeps_its_loss_within_a_tenth_of_what_redrawing_costs(kind: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **SHAPES[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        tokens = sequences(step)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    batches, held_out = [{"input_ids": sequences(1000)}], sequences(2000)

    def loss(**arguments) -> float:
        one = copy.deepcopy(model).eval()
        if arguments:
            convert(one, include="experts.*_proj", **arguments)
        with torch.no_grad():
            return one(input_ids=held_out, labels=held_out).loss.item()

    before, redrawn = loss(), loss(mode="reinit")
    cost = loss(mode="calibrate", batches=batches) - before
    assert before < 1.5
    assert cost < min(0.15, 0.1 * (redrawn - before))


def test_max_error_decides_for_each_stack_and_the_next_one_sees_true_outputs():
    batches = [routed(0, 300)]
    errors = {x.name: x.calibration.error for x in convert(alone(), mode="calibrate", batches=batches).converted}
    assert errors["experts.gate_up_proj"] < errors["experts.down_proj"]
    model, limit = alone(), sum(errors.values()) / 2
    report = convert(model, mode="calibrate", batches=batches, max_error=limit)
    assert [layer.name for layer in report.converted] == ["experts.gate_up_proj"]
    assert "exceeds max_error" in {layer.name: layer.reason for layer in report.kept}["experts.down_proj"]
    one_scale = [(x / x.norm(dim=-1, keepdim=True), *rest) for x, *rest in batches]
    assert set(dict(model.named_parameters())) == {
        "experts.gate_up_proj",
        "experts.down_proj",
        "experts.gate_up_proj_alpha",
    }
    with pytest.raises(ValueError, match="no layer can be calibrated: max_error"):
        convert(alone(), mode="calibrate", batches=one_scale, max_error=1e-3)


def test_a_first_stack_that_stays_gives_the_second_its_true_outputs():
    model, batches = alone(), [routed(0, 300)]
    report = convert(model, mode="calibrate", batches=batches, exclude="gate_up_proj", eps=EPS)
    assert [layer.name for layer in report.converted] == ["experts.down_proj"]
    assert report.converted[0].calibration.inherited == 0


@pytest.mark.parametrize("kind", SHAPES)
def test_observing_tells_each_expert_of_each_projection_and_changes_nothing(kind: str):
    model, (x, chosen, weights) = alone(kind), routed(0, 200, experts=3)
    x[:1] *= 1e4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = convert(model, mode="observe", batches=[(x, chosen, weights)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen = {(layer.name.rpartition(".")[2], layer.expert): layer for layer in report.observed}
    assert set(seen) == {(key, e) for key in ("gate_up_proj", "down_proj") for e in range(3)}
    assert "1 experts saw no token (3 of experts)" in str(report)
    for e in range(3):
        own = (chosen == e).any(-1)
        layer = seen["gate_up_proj", e]
        z = x[own] @ matrix(model.experts, "gate_up_proj", e).T
        rms = z.square().mean(-1).sqrt()
        assert layer.tokens == own.sum() == seen["down_proj", e].tokens
        assert layer.shape == (24, 16)
        assert layer.rms == pytest.approx(rms.kthvalue(1 + round(0.5 * (len(rms) - 1))).values.item(), rel=1e-5)
        assert layer.sinks == (rms > 10 * rms.median()).sum()
        alpha = whole(kind, tuple(solved(part, part) for part in halves(kind, z)))
        n = whole(kind, tuple(norm(part, EPS) for part in halves(kind, z)))
        error = ((alpha * n - z).norm(dim=-1) / z.norm(dim=-1)).median().item()
        assert layer.error == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_calibrated_stack_is_put_back_bit_for_bit_after_a_copy_and_a_saved_state(kind: str):
    model, tokens = build(kind), torch.arange(30)[None]
    before = model(input_ids=tokens).logits
    report = convert(model, mode="calibrate", batches=[{"input_ids": tokens}])
    assert not torch.equal(model(input_ids=tokens).logits, before)
    alphas = {layer.alpha_name for layer in report.converted}
    assert alphas == {name for name, _ in model.named_parameters() if name.endswith("alpha")}
    fresh = build(kind, seed=1)
    sdd.apply(fresh, report.to_json())
    fresh.load_state_dict(model.state_dict())
    for one in (model, copy.deepcopy(model), fresh):
        done = revert(one)
        assert not done.fitted
        assert "model.layers.0.mlp.experts.down_proj" in done.restored
        assert torch.equal(one(input_ids=tokens).logits, before)
        assert type(experts_of(one)).__name__ == f"{kind}Experts"


@pytest.mark.parametrize("parameter", ["down_proj", "down_proj_alpha", "down_proj_bias"])
def test_a_stack_that_was_trained_since_is_fitted(parameter: str):
    model, batches = alone("GptOss"), [routed(0, 300)]
    plain = copy.deepcopy(model.experts)
    convert(model, mode="calibrate", batches=batches)
    with torch.no_grad():
        getattr(model.experts, parameter).add_(0.01)
    with pytest.raises(UserError, match=r"1 of 2 layers, such as experts.down_proj, were trained since"):
        revert(model)
    target, other = copy.deepcopy(model), model.experts.down_proj.detach().clone()
    report = revert(model, batches)
    assert report.restored == ("experts.gate_up_proj",)
    assert [name for name, _ in report.fitted] == ["experts.down_proj"]
    assert torch.equal(model.experts.gate_up_proj, plain.gate_up_proj)
    factors = model.experts.down_proj / other
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))  # one for each output
    (x, chosen, weights), e = batches[0], 1
    own = (chosen == e).any(-1)
    x, chosen, weights = x[own], torch.full((int(own.sum()), 1), e), torch.ones(int(own.sum()), 1).double()
    u = target(x, chosen, weights) - bias(target.experts, "down_proj", e)
    z = plain._apply_gate(x @ plain.gate_up_proj[e] + bias(plain, "gate_up_proj", e)) @ other[e]
    w = u.square().mean(-1, keepdim=True).rsqrt()
    expected = ((w * z) * (w * u)).sum(0) / (w * z).square().sum(0)
    torch.testing.assert_close(factors[e, 0], expected)


class Foreign(nn.Module):
    """Experts outside transformers' interface, and attention that reads its matrices itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.narrow = nn.MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=8, bias=False)
        self.router, self.body = nn.Linear(16, 4), nn.Linear(16, 16)
        self.experts = nn.ParameterDict({"up": torch.randn(4, 16, 8), "down": torch.randn(4, 8, 16)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.attention(x, x, x)[0] + self.narrow(x, x[..., :8], x[..., :8])[0])
        hidden = torch.einsum("btd,edf->btef", x, self.experts["up"]).relu()
        return torch.einsum("btef,efd,bte->btd", hidden, self.experts["down"], self.router(x).softmax(-1))


@pytest.mark.parametrize("mode", ["reinit", "calibrate", "observe"])
def test_every_matrix_that_is_not_converted_is_named(mode):
    torch.manual_seed(0)
    model = Foreign()
    matrices = {name.removesuffix(".weight") for name, value in model.named_parameters() if value.ndim > 1}
    report = convert(model, mode=mode, batches=None if mode == "reinit" else [torch.randn(2, 10, 16)])
    named = {layer.name for layer in (*report.converted, *report.observed, *report.kept)}
    assert matrices <= named
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert "does not go through transformers' interface for experts" in reasons["experts.up"]
    assert all("MultiheadAttention" in reasons[name] for name in matrices if name.startswith(("attention", "narrow")))
