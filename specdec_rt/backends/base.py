"""What every backend offers: it makes engines of graphs, binds them to buffers, and runs their calls as one step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np

from specdec_rt.types import Array

__all__ = ["Backend", "BackendName", "BoundCall", "Device", "Engine", "Limits", "run_once"]

BoundCall = Callable[[], None]
"""Does its work once, on what its buffers hold then. Its buffers are fixed when it is made."""


class BackendName(StrEnum):
    """The backends, the best first: `auto` takes the first that can run."""

    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"
    CUDA = "cuda"
    """ONNX Runtime on an NVIDIA GPU"""
    ONNXRUNTIME = "onnxruntime"
    """ONNX Runtime on the CPU"""

    @property
    def builds_engines(self) -> bool:
        """Whether a graph is built into an engine before it runs; other backends run the ONNX file as it is."""
        return self in (BackendName.TENSORRT_RTX, BackendName.TENSORRT)


class Engine(Protocol):
    """A graph that is ready to run on one backend."""

    inputs: frozenset[str]
    """names of the graph's inputs"""
    outputs: frozenset[str]
    """names of the graph's outputs"""
    in_place: bool
    """whether one array may be both an input and an output of a call"""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:
        """A call on these buffers: running it copies nothing and allocates nothing.

        `inputs` and `outputs` name every input and output of the graph. Arrays are made by the device (or are
        contiguous parts of such arrays) and have the binding's dtype. Pass `once` for a call that runs a single
        time: it is not captured. Raises BackendError where a buffer does not fit.
        """
        ...


class Device(Protocol):
    """Makes buffers: arrays that the host fills and reads, each with a device buffer that engines use.

    On a CPU both are the same memory. On a GPU the array lies in pinned host memory and its device buffer in GPU
    memory; `upload` and `download` copy between them. All work is queued on one stream: a call returns at once,
    and `wait` returns when everything queued is done.
    """

    @property
    def kept_shapes(self) -> int:
        """For how many shapes of a step its buffers and its captured form are kept."""
        ...

    def activate(self) -> None:
        """Make the device current in this thread; each thread calls this before any other method."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:
        """An array of zeros and its device buffer, zeros too.

        Without `staged` there is no host memory: such an array only stands for its device buffer, and is never
        read or written by the host.
        """
        ...

    def stage(self, values: Array) -> Array:
        """A contiguous array with these values and its device buffer, not yet uploaded. It may be `values` itself."""
        ...

    def aligned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """An array of zeros whose entries along the first axis may each be bound to an engine.

        Every entry begins at an address that engines accept, so there may be gaps between entries.
        """
        ...

    def upload(self, *arrays: Array) -> BoundCall:
        """Copies arrays to their device buffers. Arrays are contiguous, or made by `aligned`."""
        ...

    def download(self, *arrays: Array) -> BoundCall:
        """Copies device buffers to their arrays. Arrays are contiguous, or made by `aligned`."""
        ...

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """Copies one float32 device buffer to another, broadcast to its shape; both may be views with strides."""
        ...

    def gather(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """Each row of `destination` becomes `source[index]`: float32 rows of the same width, `index` int64."""
        ...

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination[index]` becomes `source`, float32 rows. Rows with the same index must hold the same values."""
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
        """All calls as one call, launched together (as a CUDA graph where the device captures them)."""
        ...

    def wait(self) -> None:
        """Return when everything queued is done. Raises BackendError where it failed."""
        ...

    def batch_bucket(self, images: int) -> int:
        """The captured batch size that fits `images`; `images` itself where nothing is captured."""
        ...

    def bucketed(self, count: int, limit: int) -> int:
        """The captured size, at most `limit`, that fits `count`; `count` itself where nothing is captured."""
        ...


@dataclass(frozen=True)
class Limits:
    """The largest request that a backend's engines were built for; None where any size works."""

    batch_size: int | None = None
    """images decoded at a time"""
    draft_length: int | None = None
    """AR steps drafted per round"""


class Backend(Protocol):
    """A library that executes graphs, and the device it executes them on."""

    @property
    def name(self) -> str:
        """The name that users know it by; one of `BackendName` for those that this package opens."""
        ...

    @property
    def device(self) -> Device:
        """Makes the buffers that its engines are bound to."""
        ...

    @property
    def limits(self) -> Limits:
        """The largest request that its engines take."""
        ...

    def load(self, path: Path) -> Engine:
        """Make an engine of the bundle's ONNX file at `path`. Raises BackendError where that is impossible."""
        ...


def run_once(
    device: Device, engine: Engine, inputs: Mapping[str, Array], outputs: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """Run an engine once on host arrays, in buffers of its own; returns its float32 outputs, of these shapes."""
    staged = {name: device.stage(array) for name, array in inputs.items()}
    made = {name: device.zeros(shape, np.float32) for name, shape in outputs.items()}
    device.upload(*staged.values())()
    engine.bind(staged, made, once=True)()
    device.download(*made.values())()
    device.wait()
    return made
