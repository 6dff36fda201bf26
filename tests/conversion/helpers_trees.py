"""Modules built from named children, for tests that are about structure."""

from torch import nn


def tree(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def stack(n: int, block) -> nn.ModuleList:
    """`n` blocks that `block()` builds."""
    return nn.ModuleList(block() for _ in range(n))
