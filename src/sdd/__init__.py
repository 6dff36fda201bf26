"""Scale-Distribution Decoupling (arXiv 2502.15499) for PyTorch: the layer, stable pre-training, and the lab.

A public name, or a room such as `sdd.models`, is imported when it is first used, so `import sdd` costs nothing.
"""

# ruff: isort: skip_file
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:  # what the code below does, for type checkers and editors
    from . import conversion, data, functional, kernels, models, nn, placement, probing, train  # noqa: F401
    from .conversion import ConversionReport as ConversionReport, apply as apply, convert as convert, revert as revert
    from .nn import RMSNorm as RMSNorm, SDDLinear as SDDLinear
    from .optim_groups import param_groups as param_groups, warn_if_decayed as warn_if_decayed
    from .placement import Norm as Norm, Placement as Placement, placements as placements
    from .probing import Probe as Probe
else:
    #: The public names of each module.
    _PUBLIC = {
        "conversion": ("ConversionReport", "apply", "convert", "revert"),
        "nn": ("RMSNorm", "SDDLinear"),
        "optim_groups": ("param_groups", "warn_if_decayed"),
        "placement": ("Norm", "Placement", "placements"),
        "probing": ("Probe",),
    }
    __all__ = ["functional", *chain.from_iterable(_PUBLIC.values())]

    def __getattr__(name: str) -> Any:
        for home, names in _PUBLIC.items():
            if name in names:
                return getattr(import_module(f"sdd.{home}"), name)
        if name.startswith("_") or find_spec(f"sdd.{name}") is None:
            raise AttributeError(f"module 'sdd' has no attribute {name!r}")
        return import_module(f"sdd.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
