"""The lab: grids of runs, figures, and the pages of studies."""

from sdd.lab.study import Study, run_study, studies

__all__ = ["Study", "run_study", "studies"]
