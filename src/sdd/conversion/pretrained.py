"""Converted models of transformers: `save_pretrained` and `from_pretrained` with a `model_type` of their own.

A converted `LlamaForCausalLM` becomes an `SDDLlamaForCausalLM`, a subclass, whose config is an `SDDLlamaConfig`: a
`LlamaConfig` of model type `sdd-llama` that holds the description of the conversion. Building a model from such a
config applies the description before any weight is loaded. So transformers that does not know `sdd-llama`, since `sdd`
was not imported, refuses the folder, where it would otherwise build a Llama and drop every alpha.

A model that is put together from converted parts later is found when it is saved: `save_pretrained` of transformers
brings its class and config in line, in every process that converts a model while transformers is imported, or that
imports `sdd.interop.converted`.

The classes are made when they are asked for, for any model type. This module does not import transformers: who has no
model of it needs none.
"""

import copy
import functools
import gc
import importlib
import json
import sys
import warnings
from typing import Any

from torch import nn

from sdd.conversion.become import alpha_names, converted_in
from sdd.conversion.description import check_names, describe, parsed, repeat
from sdd.conversion.experts import SDDExperts
from sdd.errors import UserError, require_extra

PREFIX = "sdd-"
#: Names of parameters that a half-precision load leaves in float32: alphas of layers, and of stacked experts.
_WIDE = ("alpha", "gate_up_proj_alpha", "up_proj_alpha", "down_proj_alpha")
#: The field of the config that holds the description.
FIELD = "sdd_conversion"


def mark(model: nn.Module) -> None:
    """Bring the class and the config of every `PreTrainedModel` in line with the SDD layers that it has.

    These are all in the model, since each may be saved alone, and what holds it (LLaVA, if its language model was
    converted alone). Configs are copied, because other models may share them.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    kind = transformers.PreTrainedModel
    _look_when_saving(kind)
    if any(isinstance(module, kind) for module in model.modules()):
        _mark_inside(_holder(model, kind), kind)


def install() -> None:
    """Teach transformers' Auto classes every `sdd-` model type, in this process."""
    (auto,) = require_extra("hf", "transformers.models.auto.configuration_auto", needed_by="sdd.interop.converted")
    _look_when_saving(importlib.import_module("transformers").PreTrainedModel)
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
        repeat(self, _renamed(self, parsed(description)))  # pyright: ignore[reportArgumentType] (it is mixed into a module)
        _mark_inside(self, sys.modules["transformers"].PreTrainedModel)  # pyright: ignore[reportArgumentType]

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


def _look_when_saving(kind: Any) -> None:
    """Make `save_pretrained` see whether a model's class and config know of the SDD layers in it.

    A part cannot know into which model it is put later, and transformers would drop its alphas on loading.
    """
    plain = kind.save_pretrained
    if hasattr(plain, _LOOKS):
        return

    @functools.wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _knows(self):
            old = type(self).__name__
            _mark_inside(self, kind)
            warnings.warn(
                f"this {old} has other layers converted by sdd than when it was built or converted: it is a "
                f"{type(self).__name__} from now on, and is saved so, with a description of them in its config",
                stacklevel=2,
            )
        return plain(self, *args, **kwargs)

    setattr(save_pretrained, _LOOKS, True)
    kind.save_pretrained = save_pretrained


#: Marks the function above.
_LOOKS = "_looks_for_sdd_layers"


def _knows(model: Any) -> bool:
    """Whether class and config of a model of transformers tell of the SDD layers that conversions made in it."""
    made, modules = isinstance(model, Converted), [module for _, module in converted_in(model)]
    if not made:
        # SDD layers that the author of the class wrote are made when it is built.
        return not any(isinstance(module, SDDExperts) or module.paper_draw for module in modules)
    noted = getattr(model.config, FIELD, None)
    return bool(modules) and noted is not None and _by_name(_renamed(model, noted)) >= _by_name(describe(model))


def _by_name(description: dict[str, Any]) -> set[tuple[str, str]]:
    """The layers of a description, ready to be compared; of a config that is shared, some are not in the model."""
    layers = json.loads(json.dumps(description["layers"]))
    return {(layer["name"], json.dumps(layer, sort_keys=True)) for layer in layers}


def _holder(model: nn.Module, kind: type) -> nn.Module:
    """The outermost model of this kind that holds another one, or that one; a module does not know what holds it."""
    alive: list[Any] = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]
    around = [one for one in alive if "_modules" in vars(one) and any(inner is model for inner in one.modules())]
    return max(around, key=lambda one: len(list(one.modules())), default=model)


def _mark_inside(outer: nn.Module, kind: type) -> None:
    """Mark all models of this kind in a module, those that share a config with the description of the outermost."""
    done: set[int] = set()
    for inner in [module for module in outer.modules() if isinstance(module, kind)]:
        made, converted = isinstance(inner, Converted), any(True for _ in converted_in(inner))
        if converted != made:
            inner.__class__ = _model_class(type(inner)) if converted else _original(type(inner))
        if id(inner.config) not in done:
            _give(outer, inner.config, _marked(inner.config, describe(inner) if converted else None))
            done.add(id(inner.config))


def _marked(config: Any, description: dict[str, Any] | None) -> Any:
    """A copy of a config with the description; without one, what it was before any conversion."""
    made = type(config).model_type.startswith(PREFIX)
    if description is None and not made:
        return config
    new = copy.deepcopy(config)
    vars(new).pop("model_type", None)  # a config that was read from a file has it as an attribute of its own too
    if description is None:
        new.__class__ = _original(type(new))
        delattr(new, FIELD)
        return new
    if not made:
        new.__class__ = _config_class(type(new))
    setattr(new, FIELD, description)
    return new


def _give(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            vars(module)["config"] = new


def _original(made: type) -> type:
    """The class of transformers for which one was made here."""
    return next(base for base in made.__mro__[1:] if base is not Converted)


def _reduce(self: Any, _protocol: Any) -> Any:
    """Pickle by the class of transformers, since the one made here has no name of its own."""
    return _rebuild, (_original(type(self)),), self.__getstate__()


def _rebuild(base: type) -> Any:
    return object.__new__(_model_class(base) if issubclass(base, nn.Module) else _config_class(base))


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
        made = _made[base] = _subclass((base,), base, {"model_type": PREFIX + kind.model_type})
        auto = importlib.import_module("transformers.models.auto.configuration_auto")
        auto.CONFIG_MAPPING.register(made.model_type, made, exist_ok=True)
        _register(base, made)
        _copy_renamings(kind.model_type, made.model_type)
    return made


def _model_class(base: Any) -> Any:
    """The class of a converted model, for that of the original."""
    config = None if base.config_class is None else _config_class(base.config_class)  # registers, and may make, both
    made = _made.get(base)
    if made is None:
        strict = {*(base._keep_in_fp32_modules_strict or ()), *_WIDE}
        fields = {"config_class": config, "_keep_in_fp32_modules_strict": strict}
        made = _made[base] = _subclass((Converted, base), base, fields)
        _copy_renamings(base.__name__, made.__name__)
        _copy_recorded(base, made)
    return made


def _subclass(bases: tuple[type, ...], base: type, fields: dict[str, Any]) -> Any:
    return type(f"SDD{base.__name__}", bases, {"__module__": base.__module__, "__reduce_ex__": _reduce, **fields})


_made: dict[type, Any] = {}


def _family(model_type: str) -> None:
    """Make the config class of a model type, if transformers has it or was given it, and register what goes with it."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    if not model_type.startswith(PREFIX) and model_type in auto.CONFIG_MAPPING:
        _config_class(auto.CONFIG_MAPPING[model_type])


def _register(base: type, config: type) -> None:
    """Give the new config, in every Auto class, what the original one has there: models converted, the rest not."""
    for name in ("modeling_auto", "tokenization_auto"):
        module = importlib.import_module(f"transformers.models.auto.{name}")
        for key, mapping in [item for item in vars(module).items() if item[0].endswith("_MAPPING")]:
            if not hasattr(mapping, "register") or base not in mapping:
                continue
            found = mapping[base]
            if name == "modeling_auto":
                found = _model_class(found) if isinstance(found, type) else tuple(map(_model_class, found))
                # The trainer asks for the task of a class by its name.
                names = getattr(module, f"{key}_NAMES", {})
                names[config.model_type] = found.__name__ if isinstance(found, type) else [c.__name__ for c in found]
            mapping.register(config, found, exist_ok=True)


def _copy_recorded(base: Any, made: type) -> None:
    """Give the new class what transformers notes of a class when it is built: which outputs it can record."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    registry: Any = getattr(capturing, "_CAN_RECORD_REGISTRY", None)
    if isinstance(registry, dict):  # keyed by name; its own methods want an instance
        dict.__setitem__(registry, str(made), dict.get(registry, str(base), getattr(base, "_can_record_outputs", None)))


def _copy_renamings(old: str, new: str) -> None:
    """Where transformers renames weights on loading and saving, by model type or class, it does so here too."""
    try:
        renamings = importlib.import_module("transformers.conversion_mapping")
    except ModuleNotFoundError:  # transformers 4 has none
        return
    found = renamings.get_checkpoint_conversion_mapping(old)
    if found is not None:
        renamings.register_checkpoint_conversion_mapping(new, found, overwrite=True)
