"""Grids of runs: jobs, workers, claims, times, what is shown meanwhile."""
