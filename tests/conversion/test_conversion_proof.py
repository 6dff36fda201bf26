"""The proof by invariance: what it proves, refutes and leaves open, and that it leaves nothing behind."""

import pickle
import random
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_readers import (
    Base,
    CallsForward,
    DependsOnGrad,
    Discarded,
    OnlyInEvaluation,
    Reads,
    ReadsInEvaluation,
    ReadsIntoSlots,
    ReadsInTraining,
    ReadsNormalised,
    ReadsToo,
    Replaces,
    Rescales,
    Restless,
    Stateful,
    Unused,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdd import SDDLinear
from sdd.conversion import Proof, convert, prove
from sdd.errors import UserError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def proof_of(model: nn.Module, example: Any = X) -> Proof:
    proof = convert(model, example=example).proof
    assert proof is not None
    return proof


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- outcomes ---


@pytest.mark.parametrize("kind", [Base, CallsForward, OnlyInEvaluation, DependsOnGrad, Stateful])
def test_layers_that_are_called_are_proven(kind):
    assert proof_of(kind()).named("proven").keys() == {"good", "tested"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Reads, "reads its weight instead of calling the layer, in training mode"),
        (ReadsInTraining, "reads its weight instead of calling the layer, in training mode"),
        (ReadsInEvaluation, "reads its weight instead of calling the layer, in evaluation mode"),
        (ReadsToo, "reads its weight beside calling the layer, in training mode"),
        (ReadsNormalised, "reads its weight instead of calling the layer: alpha gets no gradient"),
        (Rescales, "changes its weight in a forward pass, in evaluation mode"),
    ],
)
def test_a_layer_used_as_a_plain_matrix_is_refuted_and_put_back_bit_for_bit(kind, reason):
    model = kind()
    layer, attributes, weight = model.tested, dict(vars(model.tested)), model.tested.weight
    before, expected = bits(layer), model.eval()(X)
    model.train()
    if kind is Rescales:  # the flag is part of the model
        model(X)
    report = convert(model, example=X)
    assert report.proof is not None
    assert report.proof.named("refuted") == {"tested": f"the model {reason}"}
    assert report.proof.named("proven").keys() == {"good"}
    assert [layer.name for layer in report.converted] == ["good"]
    assert {layer.name: layer.reason for layer in report.kept}["tested"] == f"refuted: the model {reason}"
    assert model.tested is layer
    assert type(layer) is nn.Linear
    assert layer.weight is weight
    assert vars(layer).keys() == attributes.keys()
    assert same(bits(layer), before)
    assert not torch.equal(model.eval()(X), expected)  # the other layer is redrawn


def test_a_layer_whose_weight_the_model_replaces_is_refuted_and_keeps_its_own():
    model = Replaces()
    weight = model.tested.weight
    reason = "the model changes its weight in a forward pass, in evaluation mode"
    assert proof_of(model).named("refuted") == {"tested": reason}
    assert type(model.tested) is nn.Linear
    assert model.tested.weight is weight


def test_outputs_without_a_dict_are_compared():
    assert proof_of(ReadsIntoSlots()).named("refuted").keys() == {"tested"}


def test_a_layer_without_a_call_is_not_reached_and_stays():
    model = Unused()
    assert proof_of(model).named("not reached") == {"tested": "not called"}
    assert isinstance(model.tested, SDDLinear)
    assert proof_of(Discarded()).named("not reached") == {"tested": "called, but the outputs do not depend on it"}


def test_a_restless_model_is_undecided_and_not_refuted():
    reason = "the model's outputs differ between two equal passes, in training mode"
    model = Restless()
    report = convert(model, example=X)
    assert report.proof is not None
    assert report.proof.named("undecided") == {"good": reason, "tested": reason}
    assert f"undecided: {reason}" in str(report)
    assert isinstance(model.tested, SDDLinear)


def test_outputs_without_a_finite_number_decide_nothing():
    class Nan(Base):
        def use(self, x: Tensor) -> Tensor:
            return self.tested(x) * float("nan")

    assert proof_of(Nan()).named("undecided").keys() == {"good", "tested"}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 2**30))
def test_halving_finds_exactly_the_layers_to_blame(readers, seed):
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in readers)
            self.last = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for layer, reads in zip(self.layers, readers, strict=True):
                x = F.linear(x, layer.weight) if reads else layer(x)
                x = x / x.square().mean(-1, keepdim=True).sqrt()  # or depth would end in numbers too small to tell
            return self.last(x)

    torch.manual_seed(seed)
    model = Stack()
    refuted = proof_of(model).named("refuted")
    assert list(refuted) == [f"layers.{i}" for i, reads in enumerate(readers) if reads]
    assert [isinstance(layer, SDDLinear) for layer in model.layers] == [not reads for reads in readers]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**30),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    eps=st.sampled_from([1e-12, 1e-6, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    group=st.sampled_from([None, 2, [(4, 2), (4, 0)]]),
)
def test_no_layer_is_refuted_for_its_numbers(seed, scale, eps, dtype, group):
    """The change of scale rounds nothing: whatever the values, an SDD layer gives the same bits."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        SDDLinear(8, 8, eps=eps, dtype=dtype, group=group), nn.Tanh(), SDDLinear(8, 8, eps=eps, dtype=dtype)
    )
    layers = {"0": model[0], "2": model[2]}
    x = scale * torch.randn(4, 8)
    assert prove(model, layers, x.to(dtype)).named("proven").keys() == {"0", "2"}


def test_rows_without_a_norm_are_not_rescaled():
    model = nn.Sequential(SDDLinear(8, 8, group=[(4, 4), (4, 0)]), nn.Softmax(-1))
    assert prove(model, {"0": model[0]}, X).named("proven") == {"0": ""}


# --- examples and outputs ---


@dataclass
class Output:
    logits: Tensor
    loss: float = 0.0


class Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    "pack", [lambda y: (y, None), lambda y: {"a": [y]}, Output, Opaque, lambda y: [{1}, (Opaque([Output(y)]),)]]
)
def test_outputs_of_any_structure_are_compared(pack):
    class Packed(Reads):
        def forward(self, x: Tensor) -> Any:
            return pack(super().forward(x))

    assert proof_of(Packed()).named("refuted").keys() == {"tested"}


@pytest.mark.parametrize("example", [X, (X,), {"x": X}, UserDict(x=X)])
def test_an_example_is_a_tensor_a_tuple_or_a_mapping(example):
    assert len(proof_of(Base(), example).named("proven")) == 2


def test_the_example_is_not_changed_by_a_model_that_writes_to_its_input():
    class Writes(Base):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    x = X.clone()
    assert len(proof_of(Writes(), x).named("proven")) == 2
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ([X], "example is a list: give one batch as the model takes it, a tensor, a tuple"),
        ({0: X}, "example is a dict: give one batch"),
        (X[:, :3], r"refuses the example in training mode \(RuntimeError: mat1 and mat2"),
        ({"y": X}, r"refuses the example in training mode \(TypeError: .*unexpected keyword argument 'y'"),
    ],
)
def test_an_example_that_the_model_refuses_changes_nothing(example, message):
    model = Stateful()
    before, modules, state = bits(model), [dict(vars(m)) for m in model.modules()], torch.get_rng_state()
    with pytest.raises(UserError, match=message) as caught:
        convert(model, example=example)
    assert "\n" not in str(caught.value)
    assert same(bits(model), before)
    assert [vars(m) for m in model.modules()] == modules
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_breaks_only_when_converted_is_as_it_was():
    class Checks(Base):
        def use(self, x: Tensor) -> Tensor:
            if not isinstance(self.tested, nn.Linear):
                raise TypeError("no linear")
            return self.tested(x)

    model = Checks()
    before, expected = bits(model), model(X)
    with pytest.raises(
        UserError, match=r"once converted, the model refuses the example in training mode \(TypeError: no linear\)"
    ):
        convert(model, example=X)
    assert type(model.good) is type(model.tested) is nn.Linear
    assert same(bits(model), before)
    assert torch.equal(model(X), expected)


def test_a_model_of_which_every_layer_is_refuted_is_as_it_was():
    model = Reads()
    before = bits(model)
    with pytest.raises(UserError, match="nothing to convert: the proof refuted every layer"):
        convert(model, include="tested", example=X)
    assert same(bits(model), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Base().half(), "good is float16, where the proof could overflow"),
        (Base().to("meta"), "on the meta device, where no example can run"),
        (nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3)), "lazy layers without a shape"),
    ],
)
def test_models_that_cannot_be_proven_say_so(model, message):
    with pytest.raises(UserError, match=message):
        convert(model, example=X.to(next(model.parameters()).dtype))
    assert not any(isinstance(module, SDDLinear) for module in model.modules())


# --- nothing is left behind ---


def test_a_proof_leaves_nothing_behind():
    model = Stateful()
    report = convert(model, example=X)
    model.bn.eval()
    model.zero_grad()
    model.good(X).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = bits(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    hooks = [module._forward_hooks.copy() for module in model.modules()]
    state, generator = torch.get_rng_state(), model.generator.get_state()
    draws = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    own = pickle.dumps((model.random, model.legacy, model.drawn))
    assert report.verify(model, X).named("proven").keys() == {"good", "tested"}
    assert same(bits(model), before)
    assert [vars(module) for module in model.modules()] == attributes
    assert [module._forward_hooks for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == [m is not model.bn for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generator.get_state(), generator)
    assert random.getstate() == draws[0]
    assert (np.random.get_state()[1] == draws[1]).all()  # noqa: NPY002
    assert pickle.dumps((model.random, model.legacy, model.drawn)) == own
    assert model.calls == 0
    assert model.cache == []
    assert not model.plain.any()
    assert (model.clamped == 3).all()
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())


def test_a_proof_does_not_change_what_is_drawn():
    models = []
    for example in (None, X):
        torch.manual_seed(0)
        models.append(Stateful())
        convert(models[-1], example=example)
        models[-1].extra = torch.rand(3)
    assert same(bits(models[0]), bits(models[1]))
    assert torch.equal(models[0].extra, models[1].extra)


# --- verify ---


def test_verify_refutes_without_putting_back():
    model = Reads()
    report = convert(model)
    proof = report.verify(model, X)
    assert proof.named("refuted").keys() == {"tested"}
    assert isinstance(model.tested, SDDLinear)
    assert str(proof).splitlines()[0] == "proof: 2 layers, 1 proven, 1 refuted"
    assert str(proof).splitlines()[-1].startswith("tested  refuted  the model reads its weight")


def test_verify_knows_another_model():
    report = convert(Base())
    with pytest.raises(UserError, match=r"another model: good is a Linear in this Base"):
        report.verify(Base(), X)
    with pytest.raises(UserError, match=r"another model: good is missing in this Sequential; .* without a wrapper"):
        report.verify(nn.Sequential(nn.Linear(8, 8)), X)


def test_verify_of_a_frozen_layer_needs_no_gradient():
    model = Base()
    model.tested.requires_grad_(False)
    report = convert(model)
    assert len(report.verify(model, X).named("proven")) == len(report.converted)


def test_verify_sees_through_a_checkpoint():
    class Checkpointed(Base):
        def use(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.tested, x, use_reentrant=self.reentrant)

    for reentrant in (False, True):
        model = Checkpointed()
        model.reentrant = reentrant
        assert proof_of(model).named("proven").keys() == {"good", "tested"}


def test_the_report_shows_the_share_of_parameters_and_the_draw():
    model = Reads()
    report = convert(model, example=X)
    share = 64 / sum(parameter.numel() for parameter in Reads().parameters())
    assert str(report).splitlines()[:3] == [
        "1 layer converted, all their weights redrawn, 0 of them output projections; L = 1 block",
        f"{share:.1%} of the model's 171 parameters are in converted layers",
        "proof: 2 layers, 1 proven, 1 refuted",
    ]
    assert report.to_dict()["proof"]["verdicts"][1]["outcome"] == "refuted"
