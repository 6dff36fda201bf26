"""The lab: studies as data, the engine that runs them, statistics and findings."""
