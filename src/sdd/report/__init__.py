"""The page of a run: curves, heat maps, routing, verdict."""
