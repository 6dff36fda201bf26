"""What a user should know about a model before training it: scale of attention, dropout, layers outside the blocks."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from sdd.conversion.kinds import features, told
from sdd.conversion.table import collapse

_UNSCALED = ("T5", "MT5", "UMT5", "LongT5", "SwitchTransformers", "Udop", "Pop2Piano", "Pix2Struct", "GPTNeoSelf")
_QUERIES = ("q", "q_proj", "query", "wq", "q_lin")


def notes(model: nn.Module, converted: Collection[nn.Module], outside: Sequence[str]) -> list[str]:
    """The notes for a model of which some layers are converted.

    Args:
        model: before or after the conversion.
        converted: the layers.
        outside: names of those that stand outside the blocks.
    """
    found = []
    if outside:
        names = ", ".join(name for (name,) in collapse([(name,) for name in outside]))
        found.append(f"converted outside the blocks: {names}; if one gives the model's outputs, name it in exclude")
    return [*found, *_unscaled(model.modules(), converted), *_dropout(model)]


def _unscaled(modules: Iterable[nn.Module], converted: Collection[nn.Module]) -> list[str]:
    """A note for each kind of attention that does not divide its logits by sqrt(d)."""
    said: dict[str, str] = {}
    for module in modules:
        kind = type(module).__name__
        if not kind.endswith("Attention") or not kind.startswith(_UNSCALED):
            continue
        for name, child in module.named_children():
            if name in _QUERIES and child in converted:
                said[kind] = (
                    f"{kind} does not divide its logits by sqrt(d), d the width of a head: with alpha = 1 on queries "
                    f"and keys it starts saturated. A remedy is a smaller alpha there: "
                    f"alpha_init={{{name!r}: {_alpha(module, child):.3g}, ...}}, the same for keys"
                )
    return list(said.values())


def _alpha(module: Any, query: nn.Module) -> float:
    """The alpha on queries and keys that makes up for the division by sqrt(d)."""
    names = ("key_value_proj_dim", "head_dim", "d_kv")
    width = next((value for name in names if type(value := told(module, name)) is int), features(query)[1])
    return width**-0.25


def _dropout(model: nn.Module) -> list[str]:
    """A note if any dropout is on, since some converted models bear it badly."""
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout) and module.p}
    for module in model.modules():
        settings = told(told(module, "config"), "__dict__", {})
        rates |= {value for key, value in settings.items() if _is_rate(key, value)}
    if not rates:
        return []
    return [
        f"dropout of {max(rates):g}: some converted models learn much more slowly with it; try 0 first when training "
        "from scratch"
    ]


def _is_rate(key: str, value: Any) -> bool:
    named = "dropout" in key or key.endswith("pdrop")
    return named and "classifier" not in key and isinstance(value, float) and value > 0
