"""A description travels: applied to a fresh model, it loads the saved state; mistakes are one line."""

import json

import pytest
import torch
from torch import nn

from sdd import apply, convert
from sdd.conversion import load_converted
from sdd.errors import UserError


def model(width: int = 8, names: tuple[str, ...] = ("up", "down")) -> nn.Module:
    class Net(nn.Module):
        def forward(self, x):
            return self.get_submodule(names[1])(self.get_submodule(names[0])(x).relu())

    net = Net()
    net.add_module(names[0], nn.Linear(width, 12))
    net.add_module(names[1], nn.Linear(12, width))
    return net


ARGUMENTS = [
    {},
    {"include": "up", "eps": 1e-4, "alpha_init": 0.5},
    {"group": {"up": 4}},
    {"group": {"up": [(8, 4), (4, 0)]}},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("mode", ["reinit", "calibrate"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_described_model_loads_the_state_and_computes_the_same(arguments, mode, device):
    x = torch.randn(5, 8)
    batches = {"batches": [x]} if mode == "calibrate" else {}
    net = model()
    report = convert(net, mode=mode, **batches, **arguments)
    with torch.device(device):
        fresh = model()
    again = apply(fresh, report.to_json())
    assert [layer.name for layer in again.converted] == [layer.name for layer in report.converted]
    fresh.to_empty(device="cpu")
    load_converted(fresh, net.state_dict())
    assert torch.equal(fresh(x), net(x))
    assert str(fresh) == str(net)


def test_text_dict_and_report_describe_alike_and_applying_twice_changes_nothing():
    report = convert(model(), include="up")
    for description in (report, report.to_json(), json.loads(report.to_json())):
        fresh = model()
        apply(fresh, description)
        shown = str(fresh)
        apply(fresh, description)
        assert str(fresh) == shown


def test_calibration_and_description_are_plain_json():
    report = convert(model(), mode="calibrate", batches=[torch.randn(5, 8)])
    json.dumps(report.to_dict(), allow_nan=False)
    assert {entry["name"] for entry in json.loads(report.to_json())["layers"]} == {"up", "down"}


def test_the_description_of_another_model_is_one_line_and_changes_nothing():
    text = convert(model()).to_json()
    for other, match in (
        (model(names=("upper", "down")), r"converts up, which this one does not have"),
        (model(9), r"up is \[12, 8\] there, \[12, 9\] here"),
        (nn.ModuleDict({"up": nn.ReLU(), "down": nn.Linear(12, 8)}), "up, which is a ReLU here"),
    ):
        before = str(other)
        with pytest.raises(UserError, match=match) as caught:
            apply(other, text)
        assert "\n" not in str(caught.value)
        assert str(other) == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"layers": 3, "format": 1}', '{"layers": [{}], "format": 1}', "3"])
def test_what_is_no_description_is_one_line(text):
    with pytest.raises(UserError, match=r"description"):
        apply(model(), text)


def test_a_later_format_and_a_group_that_cannot_be_are_refused():
    values = json.loads(convert(model()).to_json())
    with pytest.raises(UserError, match="has format 2, this version of sdd reads 1"):
        apply(model(), {**values, "format": 2})
    values["layers"][0]["group"] = 5
    with pytest.raises(UserError, match="does not divide"):
        apply(model(), values)


def test_half_converted_and_foreign_states_are_one_line_and_load_nothing():
    net = model()
    convert(net)
    state = net.state_dict()
    half = {name: value for name, value in state.items() if name != "up.alpha"}
    foreign = {**state, "left.weight": torch.ones(2)}
    cases = [
        (model().state_dict(), "2 of 2 alphas are missing, such as up.alpha: this is the state of a model before its"),
        (half, "1 of 2 alphas are missing, such as up.alpha: this is the state of another conversion"),
        (foreign, "names left.weight, which this model does not have"),
    ]
    before = {name: value.clone() for name, value in state.items()}
    for given, match in cases:
        with pytest.raises(UserError, match=match) as caught:
            load_converted(net, {name: torch.zeros_like(value) for name, value in given.items()})
        assert "\n" not in str(caught.value)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
