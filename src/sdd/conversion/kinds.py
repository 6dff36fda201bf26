"""Which layers of a foreign model compute `x W^T + b`, and what its modules and configs say."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from sdd.nn import SDDLinear


class SDDConv1D(SDDLinear):
    """An `SDDLinear` that keeps V as `[in_features, out_features]`, as transformers' Conv1D (GPT-2) keeps its weight.

    Names and shapes in a state dict are those of the Conv1D, so either loads the other's weight and bias. `.matrix`
    is V as `[out_features, in_features]`.
    """

    @property
    def matrix(self) -> Tensor:
        """V, `[out_features, in_features]`."""
        return self.weight.t()


def told(owner: Any, name: str, default: Any = None) -> Any:
    """What a foreign module or config has under a name; the default also where reading it raises an error.

    Properties may raise anything: transformers refuses `config.head_dim` where it differs between layers.
    """
    try:
        return getattr(owner, name, default)
    except Exception:
        return default


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a fully-connected layer with its weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_layer(module: nn.Module) -> bool:
    """Whether it is a fully-connected layer: an `nn.Linear`, a subclass of it, a Conv1D, or an SDD layer."""
    return isinstance(module, (nn.Linear, SDDLinear)) or is_conv1d(module)


def features(layer: Any) -> tuple[int, int]:
    """Input and output features of a fully-connected layer, as numbers: some models give them as tensors."""
    n_in, n_out = (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)
    return int(n_in), int(n_out)


def not_linear(layer: nn.Module) -> str | None:
    """Why the class of a layer cannot be trusted to compute `x W^T + b` from weight and bias; None if it can.

    Every class but `nn.Linear` itself is tried on a random input, in training and evaluation mode. The try uses a
    random weight, since a layer that adds a product of zeros (LoRA) looks plain at first.
    """
    if type(layer) is nn.Linear:
        return None
    kind = f"a {type(layer).__name__}"
    if layer._parameters.keys() - {"weight", "bias"} or layer._buffers or layer._modules:
        return f"{kind}: it computes with more than a weight and a bias"
    if isinstance(layer, LazyModuleMixin):
        return f"{kind}: its shape is not known yet"
    if not all(_computes_a_linear(layer, training) for training in (True, False)):
        return f"{kind}: it computes something else than x W^T + b"
    return None


@torch.no_grad()
def _computes_a_linear(layer: nn.Module, training: bool) -> bool:
    twin: Any = _twin(layer)
    twin.train(training)
    weight = twin.weight.t() if is_conv1d(layer) else twin.weight
    x = torch.rand(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
    try:
        with torch.random.fork_rng(devices=[]):
            y = twin.forward(x)
    except Exception:  # a stranger's forward may raise anything
        return False
    expected = F.linear(x, weight, twin.bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected)


def _twin(layer: nn.Module) -> nn.Module:
    """A copy of the layer on the CPU with a random weight and bias and without hooks; the layer is not touched."""
    twin = type(layer).__new__(type(layer))
    vars(twin).update(vars(layer))
    for name, value in vars(layer).items():
        if "hooks" in name and isinstance(value, dict):
            vars(twin)[name] = OrderedDict()
    generator = torch.Generator().manual_seed(0)
    vars(twin)["_parameters"] = {
        name: None if value is None else nn.Parameter(_random(value.shape, generator))
        for name, value in layer._parameters.items()
    }
    return twin


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random values, as an outer product where there are two dimensions: a large matrix costs no time."""
    factors = [torch.rand(size, generator=generator) + 0.5 for size in shape]
    return torch.outer(*factors) / shape[-1] if len(factors) == 2 else factors[0]
