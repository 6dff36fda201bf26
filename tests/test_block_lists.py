"""The lists of blocks of models that were written without SDD, for conversion and probe alike."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import sdd
from sdd.block_lists import block_lists


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) + sum(expert(x) for expert in self.experts)


def two_towers() -> nn.Sequential:
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(stack(4)), decoder=nn.ModuleList([stack(3)])))


def stack(depth: int, experts: int = 0) -> nn.Sequential:
    return nn.Sequential(*(Block(experts) for _ in range(depth)))


@pytest.mark.parametrize(
    ("model", "names", "depth"),
    [
        (nn.Sequential(OrderedDict(layers=stack(3))), ["layers"], 3),
        (stack(2, experts=5), [""], 2),
        (nn.Sequential(OrderedDict(body=stack(2, experts=5))), ["body"], 2),
        (two_towers(), ["encoder.0", "decoder.0"], 4),
        (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), [], 1),
    ],
    ids=["list", "the model itself", "experts", "two towers", "layers"],
)  # fmt: skip
def test_conversion_and_probe_count_the_same_blocks(model: nn.Module, names: list[str], depth: int):
    assert list(block_lists(dict(model.named_modules()))) == names
    with sdd.Probe(model, torch.optim.SGD(model.parameters())) as probe:
        assert len(probe._watched.blocks) == (depth if names else 0)
    assert sdd.convert(model).n_layers == depth
