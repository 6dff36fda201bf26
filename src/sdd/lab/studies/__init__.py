"""The studies, one file each: a table, a figure or a question."""
