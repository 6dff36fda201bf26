"""The studies: one file for each table, figure or question."""

from collections.abc import Mapping
from types import MappingProxyType

from sdd.lab.definition import Definition
from sdd.lab.studies import (
    convergence,
    demo,
    depth,
    gradients,
    ladder,
    length,
    lr_sensitivity,
    max_rate,
    moe,
    optimizers,
    prenorm,
    robustness,
    similarity,
)

_MODULES = (
    demo,
    robustness,
    lr_sensitivity,
    convergence,
    length,
    ladder,
    optimizers,
    moe,
    max_rate,
    depth,
    gradients,
    prenorm,
    similarity,
)
#: The studies by name.
studies: Mapping[str, Definition] = MappingProxyType({study.DEFINITION.name: study.DEFINITION for study in _MODULES})
