"""SDD for foreign models: choose the layers, convert them in place, and report."""

from sdd.conversion.convert import convert
from sdd.conversion.report import ConversionReport, ConvertedLayer, KeptLayer

__all__ = ["ConversionReport", "ConvertedLayer", "KeptLayer", "convert"]
