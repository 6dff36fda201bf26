"""SDD for foreign models: choose the layers, convert them in place, prove, and report."""

from sdd.conversion.convert import convert
from sdd.conversion.proof import Proof, Verdict, prove
from sdd.conversion.report import ConversionReport, ConvertedLayer, KeptLayer

__all__ = ["ConversionReport", "ConvertedLayer", "KeptLayer", "Proof", "Verdict", "convert", "prove"]
