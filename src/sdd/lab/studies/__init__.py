"""The studies: one file for each table, figure or question."""

from collections.abc import Mapping
from types import MappingProxyType

from sdd.lab.definition import Definition
from sdd.lab.studies import (
    alpha,
    convergence,
    decay,
    demo,
    depth,
    downstream,
    eps,
    gradients,
    ladder,
    length,
    lr_sensitivity,
    max_rate,
    moe,
    optimizers,
    precision,
    prenorm,
    robustness,
    similarity,
    variants,
)

_MODULES = (
    demo,
    robustness,
    lr_sensitivity,
    convergence,
    length,
    ladder,
    variants,
    optimizers,
    moe,
    alpha,
    decay,
    eps,
    precision,
    max_rate,
    depth,
    gradients,
    prenorm,
    similarity,
    downstream,
)
#: The studies by name.
studies: Mapping[str, Definition] = MappingProxyType({study.DEFINITION.name: study.DEFINITION for study in _MODULES})
