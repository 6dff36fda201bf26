"""`sdd import`."""

NOTE = "imported.json"
