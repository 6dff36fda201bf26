"""Figures, drawn from data that is already there."""
