"""Choice, proof and modes together: what the proof says of experts, and what it does to a calibration."""

import copy
from typing import Any

import pytest
import torch
from helpers_readers import Base, Reads
from torch import Tensor, nn

from sdd import SDDLinear
from sdd.conversion import convert
from sdd.errors import UserError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(1, 10)[None]


# --- a calibration with an example ---


@pytest.mark.parametrize("seed", range(3))
def test_what_the_proof_refutes_stays_before_alphas_are_fitted(seed):
    torch.manual_seed(seed)
    model = Reads()
    twin, weight = copy.deepcopy(model), model.tested.weight.detach().clone()
    report = convert(model, mode="calibrate", batches=[X], example=X)
    expected = convert(twin, exclude="tested", mode="calibrate", batches=[X])
    assert [layer.name for layer in report.converted] == [layer.name for layer in expected.converted] == ["good"]
    assert torch.equal(model.good.alpha, twin.good.alpha)
    assert type(model.tested) is nn.Linear
    assert torch.equal(model.tested.weight, weight)
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert reasons["tested"].startswith("refuted: the model reads its weight")
    assert report.proof is not None
    assert report.verify(model, X).named("proven").keys() == {"good"}


def test_a_proof_leaves_no_trace_in_a_calibration():
    model = Base()
    twin = copy.deepcopy(model)
    convert(model, mode="calibrate", batches=[X], example=X)
    convert(twin, mode="calibrate", batches=[X])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(model(X), twin(X))


def test_a_calibration_of_nothing_but_refuted_layers_changes_nothing():
    model = Reads()
    before = model(X)
    with pytest.raises(UserError, match="nothing to convert: the proof refuted every layer"):
        convert(model, include="tested", mode="calibrate", batches=[X], example=X)
    assert type(model.tested) is nn.Linear
    assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "observe", "example": X}, "an example proves a conversion, and mode='observe' converts nothing"),
        ({"mode": "calibrate", "redraw": True}, "redraw=True is for mode='reinit': mode='calibrate' keeps all weights"),
    ],
)
def test_arguments_that_do_not_fit_the_mode(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(Base(), batches=[X], **arguments)


def test_a_trained_model_is_calibrated_without_asking():
    model = Base()
    model(X).sum().backward()
    with pytest.raises(UserError, match="has a gradient"):
        convert(model)
    convert(model, mode="calibrate", batches=[X])
    assert isinstance(model.tested, SDDLinear)


def test_advice_for_training_from_scratch_is_not_given_to_a_trained_model():
    new, trained = (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8)) for _ in range(2))
    assert any("dropout" in note for note in convert(new).notes)
    assert not any("dropout" in note for note in convert(trained, mode="calibrate", batches=[X]).notes)


# --- stacked experts ---


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, num_local_experts=4))


class Around(nn.Module):
    """Mixtral, and beside its output what `use` makes of the experts of block 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mixtral()

    def use(self, experts: Any) -> Tensor | float:
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input_ids=x).logits + self.use(self.inner.model.layers[0].mlp.experts)


class ReadsExperts(Around):
    def use(self, experts: Any) -> Tensor | float:
        return 1e-3 * experts.down_proj.square().mean()


class Skips(Around):
    """Block 1 is not run."""

    def forward(self, x: Tensor) -> Tensor:
        body = self.inner.model
        return self.inner.lm_head(body.layers[0].mlp(body.embed_tokens(x)))


FIRST, SECOND = (f"inner.model.layers.{i}.mlp.experts" for i in (0, 1))


def test_experts_are_proven_and_hold_most_parameters():
    model = Around()
    report = convert(model, example=TOKENS)
    assert report.proof is not None
    assert {FIRST, SECOND} <= report.proof.named("proven").keys()
    assert len(report.proof.named("proven")) == len(report.proof.verdicts)
    total = sum(parameter.numel() for parameter in mixtral().parameters())
    matrices = {name: value for name, value in model.named_parameters() if value.ndim > 1}
    shares = [value.numel() for name, value in matrices.items() if "experts" in name or "self_attn" in name]
    alphas = sum(value.numel() for name, value in matrices.items() if name.endswith("_alpha"))
    assert report.share == pytest.approx((sum(shares) - alphas) / total)


def test_experts_whose_weights_are_read_are_put_back_bit_for_bit():
    model = ReadsExperts()
    experts = model.inner.model.layers[0].mlp.experts
    kind, attributes, before = type(experts), set(vars(experts)), copy.deepcopy(experts.state_dict())
    report = convert(model, example=TOKENS)
    assert type(experts) is kind
    assert set(vars(experts)) == attributes
    assert before.keys() == experts.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in experts.state_dict().items())
    kept = {layer.name: layer.reason for layer in report.kept}
    for key in ("gate_up_proj", "down_proj"):
        assert kept[f"{FIRST}.{key}"].startswith("refuted: the model reads its weight beside calling the layer")
    names = {layer.name for layer in report.converted}
    assert f"{SECOND}.down_proj" in names
    assert not any(name.startswith(FIRST) for name in names)


def test_experts_that_are_not_called_are_not_reached():
    model = Skips()
    report = convert(model, example=TOKENS)
    assert report.proof is not None
    assert report.proof.named("not reached")[SECOND] == "not called"
    assert FIRST in report.proof.named("proven")


def test_the_first_pass_names_experts_that_it_does_not_call():
    model = Skips()
    convert(model)
    with pytest.warns(UserWarning, match=r"did not call these layers .*layers\.1\.mlp\.experts"):
        model(TOKENS)
