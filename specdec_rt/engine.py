"""What every backend offers: graphs made into engines, engines bound to buffers, bound calls run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from specdec_rt.types import Array

__all__ = ["Backend", "BoundCall", "Engine"]

BoundCall = Callable[[], None]
"""Runs its engine once: reads the bound inputs as they are now, writes the bound outputs in place."""


class Engine(Protocol):
    """One executable graph on one backend."""

    inputs: frozenset[str]
    """names, as the graph itself declares them"""
    outputs: frozenset[str]

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> BoundCall:
        """Fix the buffers of a call, once, so that running it moves nothing and allocates nothing.

        Every input and output of the graph is named; arrays are C-contiguous and have the binding's
        dtype. One array may be an input and an output. Raises BackendError where a buffer does not fit.
        """
        ...


class Backend(Protocol):
    """A library that executes graphs."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    def load(self, path: Path) -> Engine:
        """Make an engine of the ONNX file at `path`. Raises BackendError where that is impossible."""
        ...
