"""A conversion as data that travels: `report.to_json()` on one machine, `sdd.apply(model, description)` on another.

A description names each converted layer with the settings of its norm, and no values. Build the model, apply the
description, load the state dict: V, b and alpha are then those that were saved.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sdd.conversion.become import (
    alpha_names,
    become_sdd,
    converted_in,
    described,
    kind_of,
    leave_fused_inference,
    remember,
    remember_experts,
)
from sdd.conversion.closed_form import Norms
from sdd.conversion.experts import SDDExperts, become_sdd_experts, expert_keys, expert_shape, has_experts
from sdd.conversion.guards import refuse_no_model
from sdd.conversion.kinds import features, is_layer
from sdd.conversion.numbers import is_finite, is_size
from sdd.conversion.report import FORMAT, ConversionReport, ConvertedLayer
from sdd.errors import UserError, nearest
from sdd.nn import SDDLinear
from sdd.norm_groups import resolve_group

_FIELDS = frozenset(ConvertedLayer.__dataclass_fields__) - {"calibration"}


def repeat(model: nn.Module, description: str | Mapping[str, Any] | ConversionReport) -> ConversionReport:
    """As `sdd.apply`, without a word to the config of a model of transformers."""
    values = parsed(description)
    layers = [_layer(entry) for entry in values["layers"]]
    modules = dict(model.named_modules(remove_duplicate=False))
    twice = [name for name, count in Counter(layer.name for layer in layers).items() if count > 1]
    if twice:
        raise UserError(f"the description has {twice[0]} twice: give what report.to_json() returned")
    for layer in layers:
        _check_fits(layer, modules)
    stacks: dict[str, list[ConvertedLayer]] = {}
    for layer in layers:
        module = modules[layer.module_name]
        if len(layer.shape) == 3:
            stacks.setdefault(layer.module_name, []).append(layer)
        elif not isinstance(module, SDDLinear):
            norms = Norms(resolve_group(layer.group, layer.shape[0]), layer.eps, layer.shared_alpha)
            remember(become_sdd(module, norms, layer.alpha_init), layer.digest)
    for name, members in stacks.items():
        if not isinstance(modules[name], SDDExperts):
            by_key = {layer.name.rpartition(".")[2]: layer for layer in members}
            alphas = {key: layer.alpha_init for key, layer in by_key.items()}
            module = become_sdd_experts(modules[name], alphas, members[0].eps)
            remember_experts(module, {key: layer.digest for key, layer in by_key.items()})
    leave_fused_inference(model)
    return ConversionReport(tuple(layers), (), values.get("n_layers", 1), mode=values.get("mode", "reinit"))


def describe(model: nn.Module) -> dict[str, Any]:
    """The description of all SDD layers that a model has now, as `apply` takes it."""
    layers = [described(name, module).description() for name, module in converted_in(model)]
    return {"format": FORMAT, "layers": layers}


def parsed(description: str | Mapping[str, Any] | ConversionReport) -> dict[str, Any]:
    """The description as a dict.

    Raises:
        UserError: if it is none, or one of a later version.
    """
    if isinstance(description, ConversionReport):
        description = description.to_json()
    try:
        values = dict(json.loads(description) if isinstance(description, str) else description)
        layers, version = values["layers"], values["format"]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"not a description of a conversion: {str(description)[:60]!r}; give what report.to_json() returned"
        ) from None
    if version != FORMAT:
        raise UserError(f"the description has format {version!r}, this version of sdd reads {FORMAT}")
    if not isinstance(layers, list):
        raise UserError("the description's layers are no list: give what report.to_json() returned")
    return values


def load_converted(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict into a converted model, strictly; torch's own `load_state_dict` does the same in more words.

    Raises:
        UserError: if the state dict lacks names, has others than this model, or other shapes; nothing is loaded.
    """
    refuse_no_model(model)
    if not isinstance(state, Mapping):
        raise UserError(f"the state is a {type(state).__name__}: give a state dict, as torch.load returns it")
    check_names(model, state.keys())
    own = model.state_dict()
    if missing := [name for name in own if name not in state]:
        raise UserError(f"the state lacks {missing[0]}, and {len(missing) - 1} more: it belongs to another model")
    for name, value in own.items():
        if isinstance(value, Tensor) and not is_lazy(value):
            _check_shape(name, state[name], value)
    model.load_state_dict(state)


def _check_shape(name: str, given: Any, own: Tensor) -> None:
    if not isinstance(given, Tensor) or given.shape != own.shape:
        what = list(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise UserError(f"the state has {what} for {name}, which is {list(own.shape)} here")


def check_names(model: nn.Module, names: Collection[str]) -> None:
    """Check that the names of a state dict are those of a converted model.

    Raises:
        UserError: if alphas are missing, or it belongs to another model or another conversion.
    """
    names, own = set(names), set(model.state_dict())
    alphas = alpha_names(model)
    missing = [name for name in alphas if name not in names]
    foreign = sorted(names - own)
    if missing:
        whose = "a model before its conversion" if len(missing) == len(alphas) else "another conversion"
        raise UserError(
            f"{len(missing)} of {len(alphas)} alphas are missing, such as {missing[0]}: this is the state of {whose}; "
            "load it before converting, or convert the same layers"
        )
    if foreign:
        raise UserError(
            f"the state names {foreign[0]}, which this model does not have{nearest(foreign[0], own)}, and "
            f"{len(foreign) - 1} more: it belongs to another model or another conversion"
        )


def _layer(entry: Any) -> ConvertedLayer:
    try:
        values = {name: value for name, value in entry.items() if name in _FIELDS}
        values["shape"] = tuple(values["shape"])
        if not _is_sound(values):
            raise TypeError
        group = values.get("group")
        values["group"] = tuple(map(tuple, group)) if isinstance(group, list) else group
        return ConvertedLayer(**{"is_output": False, **values})
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"the description has a layer that cannot be read: {str(entry)[:80]}") from None


def _is_sound(values: Mapping[str, Any]) -> bool:
    """Whether the fields of a layer, except shape and group, have values that a layer can have."""
    texts = (values["name"], values.get("kind", "Linear"), values.get("digest") or "")
    flags = (values.get("shared_alpha", False), values.get("is_output", False))
    numbers = is_finite(values["alpha_init"]) and is_size(values.get("eps", 0))
    return numbers and all(isinstance(text, str) for text in texts) and all(isinstance(flag, bool) for flag in flags)


def _check_fits(layer: ConvertedLayer, modules: Mapping[str, nn.Module]) -> None:
    module = modules.get(layer.module_name)
    if module is None:
        raise UserError(
            f"the description is that of another model: it converts {layer.name}, which this one does not have"
            f"{nearest(layer.name, modules)}"
        )
    if isinstance(module, SDDLinear | SDDExperts):
        _check_same(layer, module)
    elif kind_of(module) != layer.kind or not (shape := _shape(layer, module)):
        raise UserError(f"the description converts {layer.name}, which is a {kind_of(module)} here")
    elif shape != layer.shape:
        raise UserError(
            f"the description is that of another model: {layer.name} is {list(layer.shape)} there, {list(shape)} here"
        )
    try:
        resolve_group(layer.group, layer.shape[-2])
    except (ValueError, TypeError) as error:
        raise UserError(f"the description of {layer.name} cannot be: {error}") from None


def _shape(layer: ConvertedLayer, module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the described matrix in a module, `(out_features, in_features)`; None if it has none."""
    if len(layer.shape) == 3:
        key = layer.name.rpartition(".")[2]
        return expert_shape(module, key) if has_experts(module) and key in expert_keys(module) else None
    return features(module)[::-1] if is_layer(module) else None


def _check_same(layer: ConvertedLayer, module: SDDLinear | SDDExperts) -> None:
    names = [name for name, one in converted_in(module) if one is module]
    if isinstance(module, SDDExperts) == (len(layer.shape) == 2) or (
        isinstance(module, SDDExperts) and layer.name.rpartition(".")[2] not in names
    ):
        raise UserError(f"{layer.name} is an SDD layer already, but not as described")
    now = described(layer.name, module)
    if (now.shape, now.group, now.eps) != (layer.shape, layer.group, layer.eps):
        raise UserError(f"{layer.name} is an SDD layer already, with other settings than described")
