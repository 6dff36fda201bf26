"""What training does, site by site: the probe, and the file it writes."""

from sdd.probing.probe import Probe
from sdd.probing.rows import LAYER_STATISTICS, STATISTICS, ProbeHistory, append_row, compact, history, read_probe

__all__ = [
    "LAYER_STATISTICS",
    "STATISTICS",
    "Probe",
    "ProbeHistory",
    "append_row",
    "compact",
    "history",
    "read_probe",
]
