"""The probe: statistics of a model's modules while it trains, the file they go to, and the alarms they raise."""

from sdd.probing.probe import Probe
from sdd.probing.probe_file import LAYER_STATISTICS, STATISTICS, ProbeHistory, append_row, history, read_probe

__all__ = ["LAYER_STATISTICS", "STATISTICS", "Probe", "ProbeHistory", "append_row", "history", "read_probe"]
