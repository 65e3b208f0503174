"""Every error this package raises on purpose.

SpecDecError
├── UsageError       an option or argument is wrong        (CLI exit code 2)
│   └── ChainError   a chain on which the asked-for mode cannot work
├── BundleError      a bundle is unreadable, damaged or inconsistent (CLI exit code 2)
├── RecipeError      a recipe is unreadable, or says what cannot be built (CLI exit code 2)
├── OutputError      a result cannot be written where it was asked for (CLI exit code 2)
└── BackendError     a backend is missing or failed at run time      (CLI exit code 1)

A message names what was given, what was expected and how to mend it.
"""

__all__ = ["BackendError", "BundleError", "ChainError", "OutputError", "RecipeError", "SpecDecError", "UsageError"]


class SpecDecError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the CLI returns for it."""

    exit_code = 1


class UsageError(SpecDecError, ValueError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class ChainError(UsageError):
    """The chain's fields contradict each other or forbid the asked-for mode."""


class BundleError(SpecDecError):
    """A bundle is unreadable, truncated, altered, or does not fit its manifest."""

    exit_code = 2


class RecipeError(SpecDecError):
    """A recipe is unreadable, has unknown keys, or says what its backend or the bundle cannot have."""

    exit_code = 2


class OutputError(SpecDecError):
    """A result cannot be written to the path that was asked for."""

    exit_code = 2


class BackendError(SpecDecError):
    """A backend cannot be loaded on this machine, or failed while it ran."""
