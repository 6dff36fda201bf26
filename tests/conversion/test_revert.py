"""Reverting: exact after calibration, fitted after training, refused without batches."""

import copy

import pytest
import torch
from torch import nn

from sdd import SDDLinear, apply, convert, revert
from sdd.errors import UserError


def draw(seed: int, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8, bias=False))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", [None, 4])
def test_a_calibrated_model_becomes_the_original_bit_for_bit(seed, group):
    net, x = model(seed), draw(seed, 6, 8)
    before, keys = net(x), list(net.state_dict())
    convert(net, mode="calibrate", batches=[x], group={"*": group})
    report = revert(net)
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == keys
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear]
    assert report.restored == ("0", "2")
    assert not report.fitted
    assert str(net[0]) == str(nn.Linear(8, 12))


def test_reverting_is_exact_after_a_copy_and_after_a_saved_state():
    net, x = model(), draw(0, 6, 8)
    before = net(x)
    description = convert(net, mode="calibrate", batches=[x]).to_json()
    fresh = model(1)
    apply(fresh, description)
    fresh.load_state_dict(net.state_dict())
    for one in (copy.deepcopy(net), fresh):
        revert(one)
        assert torch.equal(one(x), before)


@pytest.mark.parametrize("parameter", ["weight", "bias", "alpha"])
def test_a_layer_that_was_trained_since_needs_batches(parameter):
    net, x = model(), draw(0, 6, 8)
    convert(net, mode="calibrate", batches=[x])
    with torch.no_grad():
        getattr(net[0], parameter).add_(0.01)
    with pytest.raises(UserError, match="1 of 2 layers, such as 0, were trained since"):
        revert(net)
    assert isinstance(net[0], SDDLinear)
    assert isinstance(net[2], SDDLinear)
    report = revert(net, [x])
    assert report.restored == ("2",)
    assert [name for name, _ in report.fitted] == ["0"]


def test_fitting_is_exact_where_tokens_have_one_scale_and_its_error_is_the_models():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12)), draw(0, 64, 8)
    convert(net, eps=1e-12)
    with torch.no_grad():
        net[0].alpha.uniform_(0.5, 2)
        net[0].bias.uniform_(-1, 1)
        one_scale = x / (x @ net[0].weight.T).square().mean(-1, keepdim=True).sqrt()
    expected, other = net(one_scale), copy.deepcopy(net)
    report = revert(net, [one_scale])
    torch.testing.assert_close(net(one_scale), expected, rtol=1e-4, atol=1e-5)
    assert report.fitted[0][1] < 1e-4
    target = other(x) - other[0].bias
    bias = other[0].bias.detach().clone()
    ((_, error),) = revert(other, [x]).fitted
    found = ((other(x) - bias - target).norm(dim=-1) / target.norm(dim=-1)).median().item()
    assert error == pytest.approx(found, rel=1e-3)


def test_nothing_to_revert_and_batches_that_reach_nothing_are_one_line():
    with pytest.raises(UserError, match="has no SDD layer"):
        revert(model())
    net = nn.ModuleDict({"body": nn.Linear(8, 8), "aside": nn.Linear(8, 8)})
    convert(net)
    net.forward = lambda x: net.body(x)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="do not reach aside"):
        revert(net, [draw(0, 4, 8)])
    assert isinstance(net.body, SDDLinear)
