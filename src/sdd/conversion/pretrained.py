"""Converted models of transformers: `save_pretrained` and `from_pretrained` with a `model_type` of their own.

A converted `LlamaForCausalLM` becomes an `SDDLlamaForCausalLM`, a subclass, whose config is an `SDDLlamaConfig`: a
`LlamaConfig` of model type `sdd-llama` that holds the description of the conversion. Building a model from such a
config applies the description before any weight is loaded. So transformers that does not know `sdd-llama`, since `sdd`
was not imported, refuses the folder, where it would otherwise build a Llama and drop every alpha.

The classes are made when they are asked for, for any model type. This module does not import transformers: who has no
model of it needs none.
"""

import copy
import importlib
import sys
from typing import Any

from torch import nn

from sdd.conversion.become import alpha_names, converted_in
from sdd.conversion.description import apply, check_names, describe
from sdd.errors import UserError, require_extra

PREFIX = "sdd-"
#: Names of parameters that a half-precision load leaves in float32: alphas of layers, and of stacked experts.
_WIDE = ("alpha", "gate_up_proj_alpha", "up_proj_alpha", "down_proj_alpha")
#: The field of the config that holds the description.
FIELD = "sdd_conversion"


def mark(model: nn.Module) -> None:
    """Bring the class and the config of every outermost `PreTrainedModel` in line with the SDD layers that it has.

    The config is copied, because other models may share it.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    for outer in _outermost(model, transformers.PreTrainedModel):
        if any(True for _ in converted_in(outer)):
            _become(outer, describe(outer))
        elif Converted in type(outer).__mro__:
            _become_plain(outer)


def install() -> None:
    """Teach transformers' Auto classes every `sdd-` model type, in this process."""
    (auto,) = require_extra("hf", "transformers.models.auto.configuration_auto", needed_by="sdd.interop.converted")
    mapping = auto.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _OnDemand):
        # Its own register() wants a finished class for each name, and there are hundreds.
        mapping._extra_content = _OnDemand(mapping._extra_content)


class Converted:
    """What a converted model's class adds to that of transformers: the conversion, before weights are loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        build: Any = super()
        build.__init__(config, *args, **kwargs)
        description = getattr(config, FIELD, None)
        if description is None:
            raise UserError(
                f"a config of type {config.model_type} without {FIELD}: it is written by save_pretrained of a model "
                "that sdd.convert has converted"
            )
        apply(self, _renamed(self, description))  # pyright: ignore[reportArgumentType] (it is mixed into a module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a state that lacks alphas, or has those of other layers, is refused.

        Raises:
            UserError: then.
        """
        load: Any = super()
        model, info = load.from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = set(info["missing_keys"]) & set(alpha_names(model))
        foreign = {name for name in info["unexpected_keys"] if name.endswith((".alpha", "_proj_alpha"))}
        check_names(model, (set(model.state_dict()) - missing) | foreign)
        return (model, info) if output_loading_info else model


class _OnDemand(dict[str, Any]):
    """Config classes by model type, where those of `sdd-...` are made when they are looked up."""

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key) and isinstance(key, str) and key.startswith(PREFIX):
            _family(key.removeprefix(PREFIX))
        return super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)


def __getattr__(name: str) -> Any:
    """The class `SDDX` of transformers' class `X`: unpickling looks them up here."""
    base = getattr(sys.modules.get("transformers"), name[3:], None) if name.startswith("SDD") else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _config_class(base) if not issubclass(base, nn.Module) else _model_class(base)


def _outermost(model: nn.Module, kind: type) -> list[Any]:
    if isinstance(model, kind):
        return [model]
    return [inner for child in model.children() for inner in _outermost(child, kind)]


def _become(model: Any, description: dict[str, Any]) -> None:
    if Converted not in type(model).__mro__:
        model.__class__ = _model_class(type(model))
    old, new = model.config, copy.deepcopy(model.config)
    if not new.model_type.startswith(PREFIX):
        new.__class__ = _config_class(type(new))
    setattr(new, FIELD, description)
    _give(model, old, new)


def _become_plain(model: Any) -> None:
    model.__class__ = next(base for base in type(model).__mro__[1:] if base is not Converted)
    old, new = model.config, copy.deepcopy(model.config)
    new.__class__ = type(new).__mro__[1]
    delattr(new, FIELD)
    _give(model, old, new)


def _give(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            vars(module)["config"] = new


def _renamed(model: Any, description: dict[str, Any]) -> dict[str, Any]:
    """The description with the names of this class: a headless model has them without its head's prefix."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    layers = description["layers"]
    if any(layer["name"] in modules for layer in layers):
        return description
    inside = [layer for layer in layers if layer["name"].startswith(prefix)]
    if inside and inside[0]["name"].removeprefix(prefix) in modules:
        layers = [{**layer, "name": layer["name"].removeprefix(prefix)} for layer in inside]
    elif layers and prefix + layers[0]["name"] in modules:
        layers = [{**layer, "name": prefix + layer["name"]} for layer in layers]
    return {**description, "layers": layers}


def _config_class(base: type) -> Any:
    """The config class of a converted model, for that of the original."""
    made = _made.get(base)
    if made is None:
        kind: Any = base
        made = _made[base] = type(f"SDD{base.__name__}", (base,), {"model_type": PREFIX + kind.model_type, **_HERE})
        auto = importlib.import_module("transformers.models.auto.configuration_auto")
        auto.CONFIG_MAPPING.register(made.model_type, made, exist_ok=True)
        _register(base, made)
        _copy_renamings(kind.model_type, made.model_type)
    return made


def _model_class(base: Any) -> Any:
    """The class of a converted model, for that of the original."""
    made = _made.get(base)
    if made is None:
        strict = {*(base._keep_in_fp32_modules_strict or ()), *_WIDE}
        config = _config_class(base.config_class)
        fields = {"config_class": config, "_keep_in_fp32_modules_strict": strict, **_HERE}
        made = _made[base] = type(f"SDD{base.__name__}", (Converted, base), fields)
        _copy_renamings(base.__name__, made.__name__)
    return made


_HERE = {"__module__": __name__}
_made: dict[type, Any] = {}


def _family(model_type: str) -> None:
    """Make the config class of a model type, if transformers has it, and register what goes with it."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    if model_type in auto.CONFIG_MAPPING_NAMES:
        _config_class(auto.CONFIG_MAPPING[model_type])


def _register(base: type, config: type) -> None:
    """Give the new config, in every Auto class, what the original one has there: models converted, the rest not."""
    for name in ("modeling_auto", "tokenization_auto"):
        module = importlib.import_module(f"transformers.models.auto.{name}")
        for mapping in [value for key, value in vars(module).items() if key.endswith("_MAPPING")]:
            if not hasattr(mapping, "register") or base not in mapping:
                continue
            found = mapping[base]
            if name == "modeling_auto":
                found = _model_class(found) if isinstance(found, type) else tuple(map(_model_class, found))
            mapping.register(config, found, exist_ok=True)


def _copy_renamings(old: str, new: str) -> None:
    """Where transformers renames weights on loading and saving, by model type or class, it does so here too."""
    try:
        renamings = importlib.import_module("transformers.conversion_mapping")
    except ModuleNotFoundError:  # transformers 4 has none
        return
    found = renamings.get_checkpoint_conversion_mapping(old)
    if found is not None:
        renamings.register_checkpoint_conversion_mapping(new, found, overwrite=True)
