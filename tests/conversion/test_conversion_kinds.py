"""Layers that compute x W^T + b without being nn.Linear: what they compute after conversion, and how they are told."""

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sdd import SDDLinear
from sdd.conversion import convert
from sdd.conversion.kinds import SDDConv1D, not_linear
from sdd.functional import sdd_linear


class Conv1D(nn.Module):
    """As in transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Transposing(nn.Linear):
    """As in Falcon."""

    def forward(self, input: Tensor) -> Tensor:
        z = input @ self.weight.T
        return z if self.bias is None else z + self.bias


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Standardised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, 0.5, self.training))


class Pairs(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        return super().forward(input), None


class LoRA(nn.Linear):
    """Its product is zero at first."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.down, self.up = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.zeros(n_out, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


class Masked(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("mask", torch.ones(n_out, n_in))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


@pytest.mark.parametrize("kind", [Doubling, Standardised, Dropping, Pairs, LoRA, Masked])
def test_a_subclass_that_computes_something_else_stays(kind):
    model = nn.ModuleDict({"odd": kind(6, 4), "body": nn.Linear(4, 4)})
    (layer,) = convert(model).kept
    assert layer.name == "odd"
    assert layer.reason.startswith(f"a {kind.__name__}: it computes ")
    assert type(model["odd"]) is kind


@given(n_in=st.integers(2, 9), n_out=st.integers(2, 9), bias=st.booleans(), seed=st.integers(0, 99))
def test_a_subclass_that_computes_the_same_is_converted(n_in: int, n_out: int, bias: bool, seed: int):
    model = nn.ModuleDict({"a": Transposing(n_in, n_out, bias).double()})
    convert(model, generator=torch.Generator().manual_seed(seed))
    layer = model["a"]
    assert type(layer) is SDDLinear
    nn.init.uniform_(layer.alpha)
    x = torch.randn(3, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(layer(x), sdd_linear(x, layer.weight, layer.alpha, layer.bias))


@given(n_in=st.integers(2, 9), n_out=st.integers(2, 9), seed=st.integers(0, 99))
def test_a_conv1d_computes_with_its_weight_transposed(n_in: int, n_out: int, seed: int):
    model = nn.ModuleDict({"a": Conv1D(n_out, n_in).double()})
    weight = model["a"].weight
    report = convert(model, eps=1e-3, generator=torch.Generator().manual_seed(seed))
    layer = model["a"]
    assert report.converted[0].shape == (n_out, n_in)
    assert layer.weight is weight
    nn.init.uniform_(layer.alpha)
    nn.init.uniform_(layer.bias)
    x = torch.randn(2, 3, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = x @ layer.weight
    expected = layer.alpha * z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt() + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.matrix, layer.weight.T)


def test_a_conv1ds_draw_goes_by_its_input_features():
    model = nn.ModuleDict({"a": Conv1D(50, 400)})
    convert(model, generator=torch.Generator().manual_seed(0))
    assert model["a"].weight.std().item() == pytest.approx(0.9866 * 0.5 * (2.5 * 400) ** -0.5, rel=0.02)


def test_state_dicts_of_conv1d_map_both_ways():
    plain, converted = nn.ModuleDict({"a": Conv1D(5, 3)}), nn.ModuleDict({"a": Conv1D(5, 3)})
    convert(converted)
    converted.load_state_dict(plain.state_dict())
    assert torch.equal(converted["a"].weight, plain["a"].weight)
    state = converted.state_dict()
    assert set(state) == {"a.weight", "a.bias", "a.alpha"}
    del state["a.alpha"]
    plain.load_state_dict(state)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    converted.load_state_dict(torch.load(file, weights_only=True))


def test_the_try_leaves_the_layer_and_the_generator_alone():
    layer = Dropping(4, 4)
    layer.register_forward_hook(lambda *_: pytest.fail("the layer was called"))
    layer.weight.register_hook(lambda *_: pytest.fail("a gradient was taken"))
    state, before = torch.get_rng_state(), layer.weight.clone()
    assert not_linear(layer) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.weight, before)
    assert layer.training
    assert layer.weight.grad is None


def test_a_subclass_is_tried_on_the_meta_device_too():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": Transposing(4, 4), "b": Doubling(4, 4)})
    report = convert(model)
    assert [layer.name for layer in report.converted] == ["a"]
    assert model["a"].weight.is_meta


def test_to_empty_and_reset_parameters_give_the_papers_draw():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(400, 50), "b": Conv1D(50, 400)})
    convert(model, alpha_init=0.5)
    model.to_empty(device="cpu")
    for layer in model.values():
        layer.reset_parameters()
        std = 0.5 * (2.5 * 400) ** -0.5
        assert layer.weight.std().item() == pytest.approx(0.9866 * std, rel=0.02)
        assert layer.weight.abs().max() <= 3 * std
        assert not layer.bias.any()
        assert (layer.alpha == 0.5).all()


def test_gpt2_is_converted():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    names = {name: value.shape for name, value in model.state_dict().items()}
    report = convert(model)
    assert len(report.converted) == 8
    assert sum(isinstance(module, SDDConv1D) for module in model.modules()) == 8
    after = model.state_dict()
    assert all(after[name].shape == shape for name, shape in names.items())
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
