"""Models of two layers and a head, which use the layer `tested` in every way that a proof must tell apart."""

import os
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Base(nn.Module):
    """A called layer `good`, one under test `tested`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.tested, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def use(self, x: Tensor) -> Tensor:
        return self.tested(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.gelu(self.use(self.good(x))))


class Reads(Base):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tested.weight, self.tested.bias)


class ReadsInTraining(Base):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tested.weight) if self.training else self.tested(x)


class ReadsInEvaluation(Base):
    def use(self, x: Tensor) -> Tensor:
        return self.tested(x) if self.training else F.linear(x, self.tested.weight)


class ReadsToo(Base):
    def use(self, x: Tensor) -> Tensor:
        return self.tested(x) + 1e-3 * self.tested.weight.square().mean()


class ReadsNormalised(Base):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.tested.weight, eps=0))


class Rescales(Base):
    """As RWKV does: a flag outside any buffer says whether the weight is already divided."""

    divided = False

    def use(self, x: Tensor) -> Tensor:
        if self.divided == self.training:
            with torch.no_grad():
                self.tested.weight.mul_(2.0 if self.training else 0.5)
            self.divided = not self.training
        return self.tested(x)


class OnlyInEvaluation(Base):
    """As layers that training drops at random."""

    def use(self, x: Tensor) -> Tensor:
        return x if self.training else self.tested(x)


class DependsOnGrad(Base):
    """As torch's attention, which takes another kernel where gradients are recorded."""

    def use(self, x: Tensor) -> Tensor:
        y = self.tested(x)
        return y * (1 + 1e-6) if torch.is_grad_enabled() else y


class Unused(Base):
    def use(self, x: Tensor) -> Tensor:
        return x


class Discarded(Base):
    def use(self, x: Tensor) -> Tensor:
        self.tested(x)
        return x


class CallsForward(Base):
    def use(self, x: Tensor) -> Tensor:
        return self.tested.forward(x)


class Restless(Base):
    """Random in training, from a source that no seed governs."""

    def use(self, x: Tensor) -> Tensor:
        noise = int.from_bytes(os.urandom(4), "little") / 2**32 if self.training else 0
        return self.tested(x) + noise


class Replaces(Base):
    """The weight of evaluation is another parameter, in the place of that of training."""

    def use(self, x: Tensor) -> Tensor:
        if not self.training:
            self.tested.weight = nn.Parameter(self.tested.weight / 2)
        return self.tested(x)


class Slots:
    """Outputs without a `__dict__`."""

    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class ReadsIntoSlots(Reads):
    def forward(self, x: Tensor) -> Any:
        return Slots(super().forward(x))


class Stateful(Base):
    """Everything that a pass may change beside its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.generator = torch.Generator().manual_seed(3)
        self.random, self.legacy = random.Random(3), np.random.RandomState(3)
        self.drawn = [np.random.default_rng(3)]
        self.calls, self.cache, self.plain = 0, [], torch.zeros(8)
        self.clamped = nn.Parameter(torch.full((8,), 3.0))

    def use(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache.append(self.calls)
        self.plain += 1
        self.clamped.data.clamp_(-2, 2)
        self.extra = x.detach()
        noise = torch.rand(8, generator=self.generator) + random.random() + np.random.rand()  # noqa: NPY002
        noise += self.random.random() + self.legacy.rand() + self.drawn[0].random()
        return self.dropout(self.bn(self.tested(x))) * self.clamped + noise + self.plain + self.calls
