"""What a user may get wrong: each mistake is one line, and the model stays as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sdd import SDDLinear, apply, convert, revert
from sdd.conversion import load_converted
from sdd.conversion.description import parsed
from sdd.errors import UserError


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def converted(**options) -> Any:
    net = model()
    convert(net, **options)
    return net


def unchanged(net: nn.Module, before: nn.Module) -> bool:
    old, new = before.state_dict(), net.state_dict()
    same_kinds = [*map(type, net.modules())] == [*map(type, before.modules())]
    return same_kinds and old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def refuses(net: nn.Module, act, message: str) -> None:
    """Check that a mistake is one line and changes nothing."""
    before = copy.deepcopy(net)
    with pytest.raises((UserError, ValueError), match=message) as caught:
        act(net)
    assert "\n" not in str(caught.value)
    assert unchanged(net, before)


BATCH = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1e-6}, "eps=-1e-06: give a number that is not negative"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": "1e-6"}, "eps='1e-6'"),
        ({"alpha_init": float("nan")}, "alpha_init=nan: give a finite number"),
        ({"alpha_init": None}, "alpha_init=None: give a finite number"),
        ({"output_alpha_init": [1]}, r"output_alpha_init=\[1\]: give a finite number"),
        ({"n_layers": "2"}, "n_layers='2': give the number of blocks"),
        ({"n_layers": 2.5}, "n_layers=2.5"),
        ({"include": 2}, "include=2: give a glob pattern"),
        ({"exclude": [2]}, r"exclude=\[2\]: give a glob pattern"),
        ({"alpha_init": {2: 0.5}}, r"alpha_init=\[2\]: give a glob pattern"),
        ({"generator": 0}, "generator=0: give a torch.Generator"),
        ({"optimizer": torch.optim.AdamW}, "optimizer is a type: give the optimiser"),
        ({"group": {"2": [(16, 0)]}}, "of 2 leaves no norm"),
        ({"group": {"2": 1}}, "of 2: the norm of a single number is its sign"),
        ({"group": {"2": "quarters"}}, "group='quarters' of 2: give a width"),
        ({"group": {"2": 4.0}}, "group=4.0 of 2: give a width"),
        ({"mode": "calibrate", "batches": 5}, "batches is one int: give a list"),
        ({"mode": "calibrate", "batches": "text"}, "batches is one str: give a list"),
        ({"mode": "calibrate", "batches": [BATCH], "max_error": "0.1"}, "max_error='0.1' must be above 0"),
    ],
)
def test_arguments_of_convert(options, message):
    refuses(model(), lambda net: convert(net, **options), message)


@pytest.mark.parametrize("act", [convert, revert, lambda it: apply(it, "{}"), lambda it: load_converted(it, {})])
@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "the model is a dict"), ("gpt2", "the model is a str"), (nn.Linear, "the model is the class Linear")],
)
def test_what_is_no_model(act, given, message):
    with pytest.raises(UserError, match=message):
        act(given)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_program_of_torchscript_and_a_compiled_model():
    traced: Any = torch.jit.trace(model(), BATCH)
    with pytest.raises(UserError, match="TorchScript"):
        convert(traced)
    compiled: Any = torch.compile(model(), backend="eager")
    compiled(BATCH)  # the hooks of a calibration would not run
    with pytest.raises(UserError, match=r"in torch\.compile already: convert it first"):
        convert(compiled, mode="calibrate", batches=[BATCH])
    in_place = model()
    in_place[2].compile(backend="eager")
    with pytest.raises(UserError, match=r"2 is compiled already, by its compile\(\)"):
        convert(in_place)


@pytest.mark.parametrize("batch", [torch.empty(0, 8), 1e-30 * BATCH], ids=["no token", "nothing to measure"])
def test_batches_without_a_size_leave_layers_as_they_are(batch):
    net = model().requires_grad_(True)
    for layer in (net[0], net[2], net[4]):
        layer.bias.data.zero_()
    refuses(net, lambda net: convert(net, mode="calibrate", batches=[batch]), "the batches reach none of the layers")


def test_a_batch_of_padding_calibrates_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model()

        def forward(self, x, attention_mask):
            return self.body(x)

    batch = {"x": torch.randn(2, 3, 8), "attention_mask": torch.zeros(2, 3)}
    refuses(Masked(), lambda net: convert(net, mode="calibrate", batches=[batch]), "the batches reach none")


def test_batches_without_tokens_fit_no_plain_layer():
    refuses(converted(), lambda net: revert(net, [torch.empty(0, 8)]), "the batches do not reach 0")


@pytest.mark.parametrize("mode", ["calibrate", "observe"])
def test_outputs_too_large_for_their_square_are_not_taken_for_zero(mode):
    net = model()
    net[0].weight.data *= 1e22
    refuses(net, lambda net: convert(net, mode=mode, batches=[BATCH]), "0 puts out values that are not finite")


@pytest.mark.parametrize("mode", ["calibrate", "observe"])
def test_a_calibration_leaves_attributes_and_buffers_as_they_were(mode):
    class Counting(nn.Sequential):
        def __init__(self):
            super().__init__(*model())
            self.calls, self.last = 0, None
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, input):
            self.calls, self.last = self.calls + 1, input
            self.seen += len(input)
            return super().forward(input)

    net: Any = Counting()
    convert(net, mode=mode, batches=[BATCH, BATCH])
    assert (net.calls, net.last, net.seen.item()) == (0, None, 0)


@pytest.mark.parametrize("options", [{}, {"example": BATCH}, {"mode": "calibrate", "batches": [BATCH]}])
def test_a_conversion_within_inference_mode_can_be_trained(options):
    net = model()
    with torch.inference_mode():
        report = convert(net, **options)
    net(BATCH).sum().backward()
    assert net[0].alpha.grad is not None
    assert report.proof is None or len(report.proof.named("proven")) == 3


def test_weights_that_cannot_be_drawn_stay():
    with torch.inference_mode():
        net = model()
    refuses(net, convert, "its weight was made within torch.inference_mode")
    net = model()
    net[2].weight = nn.Parameter(torch.ones(1, 16).expand(16, 16))
    assert "rows share their memory" in convert(net).kept[0].reason
    assert type(net[2]) is nn.Linear


@pytest.mark.parametrize(
    "change",
    [
        {"eps": "x"},
        {"eps": None},
        {"eps": -1.0},
        {"alpha_init": "1"},
        {"alpha_init": float("nan")},
        {"name": 4},
        {"digest": 3},
        {"shared_alpha": "no"},
    ],
)
def test_a_description_with_a_value_that_cannot_be(change):
    description = convert(model(), include=["0", "4"]).to_json()
    values = parsed(description)
    values["layers"][1] |= change
    refuses(model(), lambda net: apply(net, values), "a layer that cannot be read")


def test_a_description_that_names_a_layer_twice():
    values = parsed(convert(model(), include="0"))
    values["layers"] *= 2
    refuses(model(), lambda net: apply(net, values), "has 0 twice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("4.weight"), "the state lacks 4.weight"),
        (lambda state: state.update({"4.weight": torch.ones(8)}), r"the state has \[8\] for 4.weight"),
        (lambda state: state.update({"4.alpha": 3}), "the state has a int for 4.alpha"),
    ],
)
def test_a_state_that_does_not_fit_is_not_loaded_in_part(change, message):
    state = {name: value + 1 for name, value in converted().state_dict().items()}
    change(state)
    refuses(converted(), lambda net: load_converted(net, state), message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_assigning_a_half_precision_state_keeps_alpha_wide(dtype):
    net = converted()
    net.load_state_dict({name: value.to(dtype) for name, value in net.state_dict().items()}, assign=True)
    assert {layer.weight.dtype for layer in net if isinstance(layer, SDDLinear)} == {dtype}
    assert {layer.alpha.dtype for layer in net if isinstance(layer, SDDLinear)} == {torch.float32}
    assert all(layer.alpha.requires_grad for layer in net if isinstance(layer, SDDLinear))


def test_a_computed_weight_is_not_reverted():
    net = converted(mode="calibrate", batches=[BATCH])
    torch.nn.utils.parametrizations.weight_norm(net[2])
    refuses(net, lambda net: revert(net, [BATCH]), "the weight of 2 is computed")


def test_what_an_adapter_wraps_is_not_reverted():
    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x, torch.zeros(()))

    net = converted(mode="calibrate", batches=[BATCH])
    net[2] = Adapter(net[2])
    refuses(net, revert, "2 is an adapter over an SDD layer: merge it first")


def test_the_last_of_two_layers_is_no_pair():
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))  # Swin's position biases, for four heads
    assert [layer.group for layer in convert(net, include=["0", "2"]).converted] == [None, None]


def test_a_conversion_in_two_steps_says_that_it_takes_both_reports():
    net, new = model(), model()
    first = convert(net, include="0")
    second = convert(net)
    assert [note for note in second.notes if "1 layer of an earlier conversion" in note]
    for report in (first, second):
        apply(new, report)
    load_converted(new, net.state_dict())
    assert torch.equal(new(BATCH), net(BATCH))


def test_two_parameters_over_one_memory_are_tied():
    net = model()
    net[4] = nn.Linear(16, 16)
    net[4].weight = nn.Parameter(net[2].weight.data)
    assert [layer.reason.partition(":")[0] for layer in convert(net).kept] == ["tied", "tied"]
