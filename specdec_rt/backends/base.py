"""What every backend offers: graphs made into engines, engines bound to buffers, calls run as one step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from specdec_rt.types import Array

__all__ = ["Backend", "BoundCall", "Device", "Engine", "Limits", "run_once"]

BoundCall = Callable[[], None]
"""Does its work once on the buffers as they are then; what it is bound to never changes."""


class Engine(Protocol):
    """One executable graph on one backend."""

    inputs: frozenset[str]
    """names, as the graph itself declares them"""
    outputs: frozenset[str]
    in_place: bool
    """whether one array may be an input and an output of a call"""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:
        """Fix the buffers of a call, so that running it moves nothing and allocates nothing.

        Every input and output of the graph is named; arrays are the device's (or contiguous parts of them)
        and have the binding's dtype. A call that will run but `once` is never captured. Raises BackendError
        where a buffer does not fit.
        """
        ...


class Device(Protocol):
    """Where buffers lie: arrays that the host fills and reads, each with a twin that engines see.

    On a CPU an array is its own twin. On a GPU the array lies in pinned host memory and its twin in device
    memory; what moves between them is said by `upload` and `download`, and all work is queued on one stream:
    a call returns before its work is done, `wait` after it.
    """

    @property
    def kept_shapes(self) -> int:
        """For how many shapes of a step buffers and recordings are kept."""
        ...

    def activate(self) -> None:
        """Make the device this thread's; other methods need that first in every thread."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:
        """An array of zeros, and its twin. One that is not `staged` has no host side: it only names its twin."""
        ...

    def aligned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """As `zeros`, for an array whose entries along the first axis are bound one by one: each lies aligned."""
        ...

    def upload(self, *arrays: Array) -> BoundCall:
        """Copies arrays (contiguous, or pitched) to their twins."""
        ...

    def download(self, *arrays: Array) -> BoundCall:
        """Copies twins to their arrays (contiguous, or pitched)."""
        ...

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """Copies one float32 twin, broadcast if need be, to another; both may be views with strides."""
        ...

    def gather(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination [R, W] = source[index [R]]`, of rows `[N, W]`, float32."""
        ...

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination[index [R]] = source [R, W]`, float32; rows of one index hold the same values."""
        ...

    def linear_recurrence(
        self,
        path: Array,
        mean: Array,
        normals: Array,
        evaluated: tuple[Array, Array, Array],
        window: tuple[Array, Array],
        coefficients: Array,
    ) -> BoundCall:
        """Transitions that ask no engine: each row goes on with the x̂₀ that its last evaluation predicted.

        `evaluated` is what the engine did, float32 `[R, D]` each: the state before, the state after, the mean around
        which that was drawn. `window` is `(a, e)`, int64 `[R]` each: row r evaluated its transition a, and goes on to
        state e. So `path[r, a + 1]` and `mean[r, a]` become what the engine gave. With columns p, q, s, u, v of
        `coefficients [n, 5]` (float64, see `Chain.hold_coefficients`) and x̂₀ = u[a] before + v[a] mean, the
        transitions h = a + 1 … e - 1 follow: `mean[r, h] = p[h] path[r, h] + q[h] x̂₀`, and
        `path[r, h + 1] = mean[r, h] + s[h] normals[r, h + 1]`. The state at e becomes the state after. A row with
        a ≥ e stays where it is: its state after becomes its state before.

        `path` and `normals` are `[R, n + 1, D]`, `mean` is `[R, n, D]`; all arrays are contiguous float32. Sums are
        made in float64.
        """
        ...

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """All calls as one, launched together (a CUDA graph where the device has them)."""
        ...

    def wait(self) -> None:
        """Return when everything queued is done. Raises BackendError where it failed."""
        ...

    def batch_bucket(self, images: int) -> int:
        """How many images' buffers a batch of `images` takes: itself, or the next size that steps are captured for."""
        ...

    def bucketed(self, count: int, limit: int) -> int:
        """What a size that changes between calls is padded to, at most `limit`; itself where nothing is captured."""
        ...


@dataclass(frozen=True)
class Limits:
    """What a backend's engines were built for at most; None: anything goes."""

    batch_size: int | None = None
    """images at a time"""
    draft_length: int | None = None
    """AR steps drafted per round"""


class Backend(Protocol):
    """A library that executes graphs, and the device that it does so on."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def device(self) -> Device:
        """Where its engines' buffers lie."""
        ...

    @property
    def limits(self) -> Limits:
        """What its engines can take."""
        ...

    def load(self, path: Path) -> Engine:
        """Make an engine of the bundle's ONNX file at `path`. Raises BackendError where that is impossible."""
        ...


def run_once(
    device: Device, engine: Engine, inputs: Mapping[str, Array], outputs: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """The float32 outputs, of these shapes, that an engine makes of host arrays, in buffers of this call alone."""
    staged = {name: device.zeros(array.shape, array.dtype.type) for name, array in inputs.items()}
    for name, array in inputs.items():
        staged[name][...] = array
    made = {name: device.zeros(shape, np.float32) for name, shape in outputs.items()}
    device.upload(*staged.values())()
    engine.bind(staged, made, once=True)()
    device.download(*made.values())()
    device.wait()
    return made
