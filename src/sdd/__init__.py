"""Scale-Distribution Decoupling (arXiv 2502.15499) for PyTorch: the layer, stable pre-training, and the lab.

A public name, or a room such as `sdd.models`, is imported when it is first used, so `import sdd` costs nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:  # what the code below does, for type checkers and editors
    from sdd import conversion as conversion
    from sdd import data as data
    from sdd import functional as functional
    from sdd import kernels as kernels
    from sdd import models as models
    from sdd import nn as nn
    from sdd import placement as placement
    from sdd import probing as probing
    from sdd import train as train
    from sdd.conversion import ConversionReport as ConversionReport
    from sdd.conversion import convert as convert
    from sdd.nn import RMSNorm as RMSNorm
    from sdd.nn import SDDLinear as SDDLinear
    from sdd.optim_groups import param_groups as param_groups
    from sdd.placement import Norm as Norm
    from sdd.placement import Placement as Placement
    from sdd.placement import placements as placements
    from sdd.probing import Probe as Probe
else:
    #: The module that defines each public name.
    _HOMES = {
        "ConversionReport": "sdd.conversion",
        "Norm": "sdd.placement",
        "Placement": "sdd.placement",
        "Probe": "sdd.probing",
        "RMSNorm": "sdd.nn",
        "SDDLinear": "sdd.nn",
        "convert": "sdd.conversion",
        "param_groups": "sdd.optim_groups",
        "placements": "sdd.placement",
    }
    __all__ = [*_HOMES, "functional"]

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return value
        if name.startswith("_") or find_spec(f"sdd.{name}") is None:
            raise AttributeError(f"module 'sdd' has no attribute {name!r}")
        return import_module(f"sdd.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
