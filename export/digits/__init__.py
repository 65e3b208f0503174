"""Training of the shipped digits pair; run as `python -m export.digits`."""
