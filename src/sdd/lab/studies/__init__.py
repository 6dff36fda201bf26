"""The studies: one file for each table, figure or question."""

from collections.abc import Mapping
from types import MappingProxyType

from sdd.lab.definition import Definition
from sdd.lab.studies import convergence, demo, length, lr_sensitivity, moe, robustness

#: The studies by name.
studies: Mapping[str, Definition] = MappingProxyType(
    {study.DEFINITION.name: study.DEFINITION for study in (demo, robustness, lr_sensitivity, convergence, length, moe)}
)
