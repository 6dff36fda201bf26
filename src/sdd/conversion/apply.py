"""`sdd.apply`: a conversion repeated on a model that is built anew."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sdd.conversion.description import repeat
from sdd.conversion.guards import refuse_no_model
from sdd.conversion.pretrained import mark
from sdd.conversion.report import ConversionReport


@torch.inference_mode(False)
def apply(model: nn.Module, description: str | Mapping[str, Any] | ConversionReport) -> ConversionReport:
    """Repeat a conversion on a model of the same architecture, before its weights are loaded.

    Each named layer, and each named stack of experts' matrices, gets the described norm. V and b keep the values that
    the layer has, alpha is `alpha_init`: load a state dict next. What is an SDD layer with the same settings already is
    left alone. Works on the meta device.

    Args:
        model: the model as it was before the conversion.
        description: from `report.to_json()`, as text or parsed, or the report itself.

    Returns:
        The report of this conversion.

    Raises:
        UserError: if the description cannot be read or is that of another model; the model is then unchanged.
    """
    refuse_no_model(model)
    report = repeat(model, description)
    mark(model)
    return report
