"""The command line: `specdec-rt generate`, `inspect`, `build`, `bench` and `doctor`."""

from specdec_rt.cli.app import app, main, parse_labels

__all__ = ["app", "main", "parse_labels"]
