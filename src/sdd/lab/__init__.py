"""The lab: grids of runs, figures, and the pages of studies."""

from sdd.lab.study import Options, Study, run_study, studies

__all__ = ["Options", "Study", "run_study", "studies"]
