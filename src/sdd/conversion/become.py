"""The step that turns a layer, or stacked experts, into SDD ones, and the step back; values are not touched."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdd.conversion.closed_form import Norms
from sdd.conversion.experts import SDDExperts, SDDModule, become_plain_experts, expert_parts, expert_shape, plain_class
from sdd.conversion.kinds import SDDConv1D, features, is_conv1d
from sdd.conversion.report import ConvertedLayer
from sdd.nn import SDDLinear

_NORM = ("parts", "_group", "shared_alpha", "alpha_init", "eps", "paper_draw")
#: The class that a layer had, if it was another one than `nn.Linear`.
_FORMER = "former_class"


def become_sdd(linear: nn.Module, norms: Norms, alpha_init: float) -> SDDLinear:
    """Change the layer's class in place, as torch's parametrisations do.

    A new module would lose hooks, second names, and references held outside the module tree.
    """
    layer: Any = linear
    if type(linear) is not nn.Linear:
        vars(layer)[_FORMER] = type(linear)
    if is_conv1d(layer):
        layer.in_features, layer.out_features = features(layer)
        layer.__class__ = SDDConv1D
    else:
        layer.__class__ = SDDLinear
    group = as_group(norms, int(layer.out_features))
    layer._add_norm(group, norms.shared_alpha, alpha_init, norms.eps, paper_draw=True)
    return layer


def become_plain(module: SDDModule) -> None:
    """Change the class back, in place; alpha and the settings of the norm are gone."""
    if isinstance(module, SDDExperts):
        return become_plain_experts(module)
    layer: Any = module
    former = vars(layer).pop(_FORMER, nn.Linear)
    for name in ("alpha", *_NORM):
        delattr(layer, name)
    vars(layer).pop("digest", None)
    if isinstance(layer, SDDConv1D):
        del layer.in_features, layer.out_features
    layer.__class__ = former
    return None


def kind_of(module: nn.Module) -> str:
    """The name of the class that a module has, or had before it was converted."""
    if isinstance(module, SDDExperts):
        return plain_class(type(module)).__name__
    if isinstance(module, SDDLinear):
        return vars(module).get(_FORMER, nn.Linear).__name__
    return type(module).__name__


def converted_in(model: nn.Module) -> Iterator[tuple[str, SDDModule]]:
    """The converted matrices of a model by name; those of stacked experts have one module."""
    for name, module in model.named_modules():
        if isinstance(module, SDDLinear):
            yield name, module
        elif isinstance(module, SDDExperts):
            for alpha in module.alpha_names:
                key = alpha.removesuffix("_alpha")
                yield f"{name}.{key}" if name else key, module


def alpha_names(model: nn.Module) -> list[str]:
    """The names that the alphas of a model have in its state dict."""
    return [
        f"{name}_alpha" if isinstance(module, SDDExperts) else f"{name}.alpha" if name else "alpha"
        for name, module in converted_in(model)
        if isinstance(module, SDDExperts) or "alpha" in module._parameters
    ]


def as_group(norms: Norms, width: int) -> Any:
    """The groups as a user gives them: None, one width, or parts."""
    if len(norms.parts) == 1 and norms.parts[0][1]:
        group_width = norms.parts[0][1]
        return None if group_width == width else group_width
    return tuple(norms.parts)


def described(name: str, module: SDDModule, is_output: bool = False, **more: Any) -> ConvertedLayer:
    """The line of a converted matrix in the report."""
    settings: dict[str, Any] = {"is_output": is_output, "eps": module.eps, "kind": kind_of(module), **more}
    if isinstance(module, SDDExperts):
        key = name.rpartition(".")[2]
        alpha_init = module.alpha_inits[module.alpha_names.index(f"{key}_alpha")]
        kept = vars(module).get("digests", {}).get(key)
        shape, group = expert_shape(module, key), expert_parts(module, key)
        return ConvertedLayer(name, shape, alpha_init, group=group, digest=kept, **settings)
    shape = (int(module.out_features), int(module.in_features))
    shared, digest = module.shared_alpha, vars(module).get("digest")
    return ConvertedLayer(
        name, shape, module.alpha_init, group=module.group, shared_alpha=shared, digest=digest, **settings
    )


def digest(module: SDDModule, key: str = "weight") -> str:
    """A SHA-256 of V, b and alpha of a layer, or of one name in stacked experts: whether anything was lost since."""
    whole = hashlib.sha256()
    names = (key, "bias", "alpha") if isinstance(module, SDDLinear) else (key, f"{key}_bias", f"{key}_alpha")
    for tensor in map(module._parameters.get, names):
        if tensor is not None:
            whole.update(_bytes(tensor))
    return whole.hexdigest()


def remember(layer: SDDLinear, digest: str | None) -> None:
    """Keep the digest that a layer had right after calibration."""
    vars(layer)["digest"] = digest


def remember_experts(module: SDDExperts, digests: Mapping[str, str | None]) -> None:
    """Keep the digests that stacked matrices had right after calibration, by their names in the module."""
    vars(module)["digests"] = {key: value for key, value in digests.items() if value is not None}


def is_as_calibrated(module: SDDModule) -> bool:
    """Whether V, b and alpha have the bits that calibration left; of stacked experts, all of them."""
    if isinstance(module, SDDExperts):
        return not changed_keys(module)
    kept = vars(module).get("digest")
    return kept is not None and kept == digest(module)


def changed_keys(module: SDDExperts) -> list[str]:
    """The names of the converted matrices in a module of experts that have not the bits that calibration left."""
    kept, keys = vars(module).get("digests", {}), [name.removesuffix("_alpha") for name in module.alpha_names]
    return [key for key in keys if kept.get(key) != digest(module, key)]


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
