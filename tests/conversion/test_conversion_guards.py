"""Models that are not redrawn in silence, and those that it is too late to convert."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sdd import SDDLinear
from sdd.conversion import convert
from sdd.errors import UserError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def loaded() -> tuple[nn.Module, None]:
    outer = nn.ModuleDict({"inner": model()})
    outer["inner"].config = SimpleNamespace(_name_or_path="some/model")
    return outer, None


def with_gradient() -> tuple[nn.Module, None]:
    net = model()
    net(torch.ones(1, 4)).sum().backward()
    net[0].weight.grad = net[0].bias.grad = net[2].weight.grad = None
    return net, None


def with_steps() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


@pytest.mark.parametrize(
    ("make", "sign"),
    [
        (loaded, "its config was loaded from 'some/model'"),
        (with_gradient, "2.bias has a gradient"),
        (with_steps, "its optimiser has taken steps"),
    ],
)
def test_a_trained_model_is_redrawn_only_if_asked(make, sign):
    net, optimizer = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError, match=f"the model may be trained: {sign}.*redraw=True"):
        convert(net, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert convert(net, optimizer=optimizer, redraw=True).redrawn


def test_a_fresh_optimiser_gets_a_note():
    net = model()
    report = convert(net, optimizer=torch.optim.AdamW(net.parameters()))
    assert any("the optimiser does not hold the new alphas" in note for note in report.notes)


@pytest.fixture
def _one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_it_is_too_late_after_ddp():
    net = model()
    wrapper = DistributedDataParallel(net)
    for given in (wrapper, net, nn.Sequential(net)):
        with pytest.raises(UserError, match=r"already in DistributedDataParallel.*convert it first"):
            convert(given)
    assert type(net[0]) is nn.Linear
    convert(model())


@pytest.mark.usefixtures("_one_process")
def test_it_is_too_late_after_fully_shard():
    net = model()
    fully_shard(net, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(UserError, match="already sharded"):
        convert(net)
    assert not isinstance(net[0], SDDLinear)
