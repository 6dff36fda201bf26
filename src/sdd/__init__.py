"""Scale-Distribution Decoupling (arXiv 2502.15499) for PyTorch: the layer, stable pre-training, and the lab."""

from sdd import functional
from sdd.conversion import ConversionReport, convert
from sdd.nn import RMSNorm, SDDLinear
from sdd.optim_groups import param_groups
from sdd.placement import Norm, Placement, placements
from sdd.probing import Probe

__version__ = "0.1.0.dev0"

__all__ = [
    "ConversionReport",
    "Norm",
    "Placement",
    "Probe",
    "RMSNorm",
    "SDDLinear",
    "convert",
    "functional",
    "param_groups",
    "placements",
]
