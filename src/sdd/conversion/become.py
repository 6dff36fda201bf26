"""The step that turns one `nn.Linear` into an `SDDLinear`, and the step back; values are not touched."""

import hashlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.calibrate import Norms
from sdd.conversion.report import ConvertedLayer
from sdd.nn import SDDLinear

_NORM = ("parts", "_group", "shared_alpha", "alpha_init", "eps")


def become_sdd(linear: nn.Linear, norms: Norms, alpha_init: float) -> SDDLinear:
    """Change the layer's class in place, as torch's parametrisations do.

    A new module would lose hooks, second names, and references held outside the module tree.
    """
    layer: Any = linear
    layer.__class__ = SDDLinear
    layer._add_norm(as_group(norms, linear.out_features), norms.shared_alpha, alpha_init, norms.eps)
    return layer


def become_linear(layer: SDDLinear) -> nn.Linear:
    """Change the layer's class back, in place; alpha and the settings of the norm are gone."""
    linear: Any = layer
    for name in ("alpha", *_NORM):
        delattr(linear, name)
    vars(linear).pop("digest", None)
    linear.__class__ = nn.Linear
    return linear


def as_group(norms: Norms, width: int) -> Any:
    """The groups as a user gives them: None, one width, or parts."""
    if len(norms.parts) == 1 and norms.parts[0][1]:
        group_width = norms.parts[0][1]
        return None if group_width == width else group_width
    return norms.parts


def described(name: str, layer: SDDLinear, is_output: bool, **more: Any) -> ConvertedLayer:
    """The line of a layer in the report."""
    shape = (layer.out_features, layer.in_features)
    return ConvertedLayer(name, shape, layer.alpha_init, is_output, layer.eps, layer.group, layer.shared_alpha, **more)


def as_described(layer: ConvertedLayer) -> dict[str, Any]:
    """A layer as `to_json` writes it: without what is None, and without the numbers of its calibration."""
    return {name: value for name, value in asdict(layer).items() if name != "calibration" and value is not None}


def digest(layer: SDDLinear) -> str:
    """A SHA-256 of V, b and alpha: whether anything was lost since a calibration."""
    whole = hashlib.sha256()
    for tensor in (layer.weight, layer.bias, layer.alpha):
        if tensor is not None:
            whole.update(_bytes(tensor))
    return whole.hexdigest()


def remember(layer: SDDLinear, digest: str | None) -> None:
    """Keep the digest that a layer had right after calibration."""
    vars(layer)["digest"] = digest


def is_as_calibrated(layer: SDDLinear) -> bool:
    """Whether V, b and alpha have the bits that calibration left."""
    kept = vars(layer).get("digest")
    return kept is not None and kept == digest(layer)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def leave_fused_inference(model: nn.Module) -> None:
    """Switch off the fused inference path of nn.TransformerEncoder, which reads converted weights as plain ones."""
    for module in model.modules():
        if not any(isinstance(inner, SDDLinear) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the path requires it to be 1 or 2
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
