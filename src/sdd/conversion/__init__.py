"""SDD for foreign models: choose the layers, convert them in place, prove, calibrate, revert, and report."""

from sdd.conversion.apply import apply
from sdd.conversion.convert import convert
from sdd.conversion.description import load_converted
from sdd.conversion.proof import Proof, Verdict, prove
from sdd.conversion.report import Calibration, ConversionReport, ConvertedLayer, KeptLayer
from sdd.conversion.revert import RevertReport, revert

__all__ = [
    "Calibration",
    "ConversionReport",
    "ConvertedLayer",
    "KeptLayer",
    "Proof",
    "RevertReport",
    "Verdict",
    "apply",
    "convert",
    "load_converted",
    "prove",
    "revert",
]
