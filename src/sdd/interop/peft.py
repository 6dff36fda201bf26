"""LoRA on SDD layers: `import sdd.interop.peft` lets PEFT adapt them, `targets(model)` names them.

    y = alpha * norm((V + sum over active adapters of s B A) x) + b

with s the adapter's scaling. The adapter's product stands under the norm, so merging an adapter adds s B A to V, and
the merged layer computes the same. `modules_to_save=["alpha"]` in a LoraConfig trains alpha too: each adapter then has
a shift of alpha, zero at first, which is saved, loaded, merged and switched with A and B.

The import reaches every LoraConfig that is built afterwards, also those that PEFT reads from an adapter's folder: PEFT
asks each config for layers of its own (`_register_custom_module`). It also lets transformers load converted models, as
`sdd.interop.converted` does. Importing this module raises MissingPackage without PEFT.

The config of an adapter notes which of its layers were SDD layers (`sdd_layers` in adapter_config.json), and the
adapter is refused on a base where one of these is plain: s B A would be added to outputs that no norm follows. Without
this import, PEFT warns that it does not know `sdd_layers`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sdd.conversion.experts import SDDExperts
from sdd.conversion.guards import refuse_no_model
from sdd.conversion.kinds import SDDConv1D
from sdd.conversion.pretrained import install
from sdd.errors import UserError, require_extra
from sdd.models.block import FeedForward
from sdd.nn import ExpertLinear, SDDLinear
from sdd.parameters import keep_wide

_peft, _layer, _model, _utils = require_extra(
    "peft", "peft", "peft.tuners.lora.layer", "peft.tuners.lora.model", "peft.tuners.tuners_utils", needed_by=__name__
)

#: What `init_lora_weights` may be. The others want statistics of a plain matrix, replace it by a quantised one, or
#: (olora) take a weight that is stored transposed for one that is not.
_INITS = (True, False, "gaussian", "orthogonal", "pissa")
#: The entry of `modules_to_save` that trains alpha.
_ALPHA = "alpha"


class SDDLoraLinear(_layer.Linear):
    """PEFT's LoRA layer around an `SDDLinear`: its product goes under the norm.

    Merging, scaling, initialisation and the choice of adapters are PEFT's.

    Attributes:
        lora_scale: the shift of alpha of each adapter that trains it, at least float32.

    Raises:
        UserError: for what would not be plain LoRA under the norm: DoRA and other variants, `lora_bias`, an
            initialisation from more than the weight.
    """

    adapter_layer_names = (*_layer.LoraLayer.adapter_layer_names, "lora_scale")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: int, **kwargs: Any):
        nn.Module.__init__(self)
        _layer.LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_scale = nn.ParameterDict()
        self.fan_in_fan_out = isinstance(self.get_base_layer(), SDDConv1D)  # config's is one for all layers
        self.is_target_conv_1d_layer = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """Refuse every variant of LoRA. DoRA's magnitude is a scale of each output, which alpha is already."""
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None:
            raise UserError(
                f"{type(variant).__name__} is not for SDD layers, which take plain LoRA, with or without use_rslora"
            )

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter, and its shift of alpha if the config asks for it."""
        _check(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        alpha = self.get_base_layer()._parameters.get("alpha")  # a buffer, if it is not learned
        if alpha is not None and _ALPHA in (config.modules_to_save or ()):
            self.lora_scale[adapter_name] = nn.Parameter(torch.zeros_like(alpha))
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `.half()`, `.to(...)` and the like; shifts of alpha stay at least float32, as alpha does."""
        keep_wide(self.lora_scale, list(self.lora_scale), lambda: super(SDDLoraLinear, self)._apply(fn, recurse))
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`alpha * norm(V x + s B A dropout(x)) + b`, with the sum over the active adapters."""
        self._check_forward_args(x, *args, **kwargs)
        rows = kwargs.get("adapter_names")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        if rows is not None:
            return self.base_layer(x, self._by_row(x, rows))
        active = [name for name in self.active_adapters if name in self.lora_A]
        products = [self._product(name, x) for name in active]
        return self.base_layer(x, sum(products) if products else None, self._alpha(active))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add `s B A` to V, and the shift to alpha."""
        before = len(self.merged_adapters)
        if safe_merge and not all(shift.isfinite().all() for shift in self.lora_scale.values()):
            raise ValueError("NaNs detected in the merged alpha. The adapter seems to be broken")
        super().merge(safe_merge, adapter_names)
        self._shift(self.merged_adapters[before:], 1)

    def unmerge(self) -> None:
        """Subtract them again."""
        merged = list(self.merged_adapters)
        super().unmerge()
        self._shift(merged, -1)

    def _shift(self, adapters: list[str], sign: int) -> None:
        for name in adapters:
            if name in self.lora_scale:
                self.get_base_layer().alpha.data += sign * self.lora_scale[name].data

    def _product(self, adapter: str, x: Tensor) -> Tensor:
        x = self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)
        return self.lora_B[adapter](self.lora_A[adapter](self.lora_dropout[adapter](x))) * self.scaling[adapter]

    def _by_row(self, x: Tensor, rows: list[str]) -> Tensor:
        """Each row's product with its own adapter; zeros for `__base__`."""
        added = x.new_zeros(*x.shape[:-1], self.out_features)
        for name in set(rows) & set(self.lora_A):
            if name in self.lora_scale:
                raise UserError(f"adapter_names: adapter {name!r} trains alpha, which cannot differ by row")
            chosen = [i for i, row in enumerate(rows) if row == name]
            product = self._product(name, x[chosen])
            added = added.to(torch.promote_types(added.dtype, product.dtype))
            added[chosen] = product.to(added.dtype)
        return added

    def _alpha(self, adapters: list[str]) -> Tensor | None:
        alpha: Tensor = self.get_base_layer().alpha
        shifts = [self.lora_scale[name] for name in adapters if name in self.lora_scale]
        return sum(shifts, alpha) if shifts else None


def targets(model: nn.Module) -> list[str]:
    """The names of a model's SDD layers, for `target_modules` of a LoraConfig.

    PEFT's "all-linear" looks for `nn.Linear` and passes by them. Plain layers, such as a head, are not among these
    names. Neither are experts, nor projections that share one norm (gate and up of `sdd-released`): no adapter fits
    those.

    Args:
        model: a converted model, a `LanguageModel`, or either of them within a `PeftModel`.

    Raises:
        UserError: if there is none.
    """
    refuse_no_model(model)
    if isinstance(model, _peft.PeftModel):
        adapted: Any = model
        model = adapted.get_base_model()
    shared = {
        layer
        for module in model.modules()
        if isinstance(module, FeedForward) and module.joint
        for layer in (module.gate_proj, module.up_proj)
    }
    found = [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, SDDLinear) and module not in shared
    ]
    if not found:
        raise UserError(
            f"this {type(model).__name__} has no SDD layer that LoRA fits: convert it first, or, if all its layers "
            "are plain, give target_modules='all-linear'"
        )
    return found


def _check(config: Any) -> None:
    if config.lora_bias:
        raise UserError(
            "lora_bias=True would add a bias under the norm of an SDD layer, which has none there: leave it"
        )
    init = config.init_lora_weights
    if init not in _INITS and not str(init).startswith("pissa_niter_"):
        known = ", ".join(map(repr, _INITS))
        raise UserError(f"init_lora_weights={init!r} is not for SDD layers; choose one of {known}")


def _linear(target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any) -> Any:
    """The layer for an `SDDLinear`; None, for PEFT's own, if its parameter is targeted by name."""
    return None if parameter_name else SDDLoraLinear(target, adapter_name, config, **kwargs)


def _stack(target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **_: Any) -> None:
    """None, for PEFT's own wrapper of a parameter, which goes under the norm too."""
    if parameter_name is None:
        raise UserError(
            f"a {type(target).__name__} is a stack of experts, no layer: adapt it by its parameters, "
            "target_parameters=['experts.gate_up_proj', 'experts.down_proj']"
        )


def _own_experts(target: nn.Module, *_: Any, **__: Any) -> None:
    raise UserError(
        f"LoRA cannot adapt a {type(target).__name__}, the experts of a LanguageModel: adapt other layers, or export "
        "the run, which makes each expert a module of plain layers (sdd export RUN DIR)"
    )


#: What makes the LoRA layer of each class.
_LAYERS = {SDDLinear: _linear, SDDExperts: _stack, ExpertLinear: _own_experts}


def _register() -> None:
    """Give our layers to every LoraConfig from now on."""
    config, finish = _peft.LoraConfig, _peft.LoraConfig.__post_init__

    @functools.wraps(finish)
    def with_sdd(self: Any) -> None:
        finish(self)
        self._register_custom_module(_LAYERS)

    config.__post_init__ = with_sdd


def _note_sdd_layers() -> None:
    """Have the config of an adapter remember which of its layers were SDD layers, in its file too."""
    config, tuner = _peft.LoraConfig, _model.LoraModel
    init, as_dict, inject = config.__init__, config.to_dict, tuner.inject_adapter
    config.sdd_layers = None

    @functools.wraps(init)
    def with_names(self: Any, *args: Any, sdd_layers: list[str] | None = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.sdd_layers = sdd_layers

    @functools.wraps(as_dict)
    def to_dict(self: Any) -> dict[str, Any]:
        names = {} if self.sdd_layers is None else {"sdd_layers": self.sdd_layers}
        return {**as_dict(self), **names}

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        chosen = self.peft_config[adapter_name]
        found = _adapted(model, chosen) if type(chosen) is config else []
        if gone := [name for name in chosen.sdd_layers or () if name not in found]:
            raise UserError(
                f"the adapter was trained on a converted model, where {gone[0]} was an SDD layer; in this "
                f"{type(model).__name__} it is none: load the converted base, or convert this one"
            )
        inject(self, model, adapter_name, *args, **kwargs)
        chosen.sdd_layers = found or None

    signature = inspect.signature(init)  # PEFT drops what is not in it, if a file has something else that it ignores
    names = inspect.Parameter("sdd_layers", inspect.Parameter.KEYWORD_ONLY, default=None)
    whole = signature.replace(parameters=[*signature.parameters.values(), names])
    vars(with_names)["__signature__"] = whole
    config.__init__, config.to_dict, tuner.inject_adapter = with_names, to_dict, inject_adapter


def _adapted(model: nn.Module, config: Any) -> list[str]:
    """The names of the SDD layers, and of the stacks of converted experts, that a config adapts."""
    modules = {name: _unwrapped(module) for name, module in model.named_modules() if not name.endswith(".base_layer")}
    layers = [name for name, module in modules.items() if isinstance(module, SDDLinear)]
    stacks = [name for name, module in modules.items() if isinstance(module, SDDExperts)]
    holders = [parameter.rpartition(".")[0] for parameter in config.target_parameters or ()]
    names = [name for name in layers if _utils.check_target_module_exists(config, name)]
    return names + [name for name in stacks if any(f".{name}".endswith(f".{holder}") for holder in holders)]


def _unwrapped(module: Any) -> nn.Module:
    """The module under its adapters."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _warn_of_all_linear() -> None:
    """Say in one line what "all-linear" passes by, whatever the method of PEFT."""
    resolve = _utils._maybe_include_all_linear_layers

    @functools.wraps(resolve)
    def with_warning(peft_config: Any, model: nn.Module) -> Any:
        sdd_layers = [name for name, module in model.named_modules() if isinstance(module, SDDLinear)]
        passed_by = [name for name in sdd_layers if not name.endswith(".base_layer")]  # those have an adapter
        if passed_by and str(getattr(peft_config, "target_modules", None)).lower() == "all-linear":
            warnings.warn(
                f"target_modules='all-linear' looks for nn.Linear and passes by {len(passed_by)} SDD layers, such as "
                f"{passed_by[0]}: LoRA takes target_modules=sdd.interop.peft.targets(model)",
                stacklevel=2,
            )
        return resolve(peft_config, model)

    _utils._maybe_include_all_linear_layers = with_warning


_register()
_note_sdd_layers()
_warn_of_all_linear()
install()
