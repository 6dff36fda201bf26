"""Layers that no pass has reached yet: named after the first pass, or decided at their first call."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdd.conversion import convert

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Expert 1 is used only where the first feature is large; `reads` says how."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.dropout, self.head = nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts[0](x)
        if (x[:, 0] > 100).any():
            y = y + self.experts[1](x)
            if self.reads:
                y = y + F.linear(x, self.experts[1].weight)
        return self.head(self.dropout(y))


FAR = X + 200


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_without_an_example_the_first_pass_names_what_it_did_not_call():
    model = Experts()
    convert(model)
    with pytest.warns(UserWarning, match=r"did not call these layers converted by sdd: experts\.1\. "):
        model(X)
    assert hooks(model) == 0
    model = Experts()
    convert(model)
    model(FAR)  # warns of nothing
    assert hooks(model) == 0


def test_a_pass_that_fails_names_nothing():
    model = Experts()
    convert(model)
    with pytest.raises(RuntimeError, match="mat1"):
        model(X[:, :3])
    with pytest.warns(UserWarning, match=r"experts\.1"):
        model(x=X)
    assert hooks(model) == 0


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_watches_itself(twin):
    model = Experts()
    convert(model)
    other = twin(model)
    with pytest.warns(UserWarning, match=r"experts\.1"):
        other(X)
    assert hooks(other) == 0
    assert hooks(model) == 2
    with pytest.warns(UserWarning, match=r"experts\.1"):
        model(X)


def test_a_layer_that_the_example_missed_is_proven_at_its_first_call(caplog):
    model = Experts()
    report = convert(model, example=X)
    assert report.proof is not None
    assert report.proof.named("not reached").keys() == {"experts.1"}
    assert "experts.1  not reached: not called" in str(report)
    model(X)
    assert hooks(model) == 2
    with caplog.at_level(logging.INFO, "sdd.conversion.watch"):
        model(FAR)
    assert caplog.messages == ["called for the first time: experts.1; proof: 1 layer, 1 proven"]
    assert hooks(model) == 0


def test_a_layer_that_the_example_missed_is_refuted_at_its_first_call():
    model = Experts(reads=True)
    convert(model, example=X)
    with pytest.warns(UserWarning, match=r"experts\.1, converted by sdd, does not work as an SDD layer: the model"):
        model(FAR)
    assert hooks(model) == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_decision_in_mid_training_changes_no_bit(training):
    """With dropout: outputs, gradients and the generator are those of a model without the hooks."""
    torch.manual_seed(0)
    model = Experts()
    plain = copy.deepcopy(model)
    results = []
    for net, example in ((model, X), (plain, None)):
        torch.manual_seed(1)
        convert(net, example=example)
        net.train(training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = net(FAR)
        y.square().sum().backward()
        results.append((y, *(parameter.grad for parameter in net.parameters()), torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_check_that_fails_does_not_end_training(monkeypatch, caplog):
    model = Experts()
    convert(model, example=X)
    monkeypatch.setattr("sdd.conversion.watch.prove", lambda *a, **k: (_ for _ in ()).throw(MemoryError("full")))
    assert model(FAR).shape == (5, 3)
    assert caplog.messages == ["called for the first time, not checked (full): experts.1"]
    assert hooks(model) == 0


def test_the_hooks_stand_aside_for_compile_and_export():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    convert(model)
    graph = torch.export.export(model, (X,)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y = compiled(X)
    assert hooks(model) == 2
    assert torch.equal(y, model(X))
    assert torch.equal(y, graph(X))
    assert hooks(model) == 0
