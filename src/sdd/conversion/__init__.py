"""SDD for foreign models: which layers to convert, the conversion and its report."""

from sdd.conversion.convert import convert
from sdd.conversion.report import ConversionReport, ConvertedLayer, KeptLayer

__all__ = ["ConversionReport", "ConvertedLayer", "KeptLayer", "convert"]
