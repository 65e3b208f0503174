"""What every backend offers: it makes engines of graphs, binds them to buffers, and runs their calls as one step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np

from specdec_rt.types import Array, FloatArray

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
        """`destination [R, W] = source[index]`, with `source [N, W]` float32 and `index [R]` int64."""
        ...

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination[index] = source [R, W]`, float32. Rows with the same index must hold the same values."""
        ...

    def recur(
        self, path: Array, mean: Array, noise: Array, held: tuple[Array, Array], factors: FloatArray
    ) -> BoundCall:
        """A linear recurrence: H transitions that ask no engine, added up in float64.

        From `path[0]` on, with `factors [H, 4]` called f: `mean[h] = f0 path[h] + f1 held[0] + f2 held[1]` and
        `path[h + 1] = mean[h] + f3 noise[h]`. `path [H + 1, …]`, `mean` and `noise [H, …]`, contiguous or pitched,
        `held` contiguous; no two overlap, but `held[0]` may lie before `path[0]`.
        """
        ...

    def recur_rows(
        self,
        path: Array,
        mean: Array,
        noise: Array,
        state: Array,
        made: tuple[Array, Array],
        window: tuple[Array, Array],
        factors: Array,
    ) -> BoundCall:
        """A linear recurrence in a window of each row's own, begun by what an engine made; added up in float64.

        Row r goes from step a to step e, `(a, e)` its entries of `window`, int64 `[R]` each; where a ≥ e it stays.
        Its entries of `made`, next state and mean `[R, D]`, become `path[r, a + 1]` and `mean[r, a]`. With `factors
        [L, 5]` (float64) called f and held = f3[a] path[r, a] + f4[a] mean[r, a], the steps h after a are
        `mean[r, h] = f0[h] path[r, h] + f1[h] held` and `path[r, h + 1] = mean[r, h] + f2[h] noise[r, h]`. The state
        that it ends at goes to `state [R, D]`, too. `path [R, L + 1, D]`, `mean` and `noise [R, L, D]`; contiguous.
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


def run_once(device: Device, engine: Engine, inputs: Mapping[str, Array], output: str, shape: tuple[int, ...]) -> Array:
    """Run an engine once on host arrays, in buffers of its own; returns its float32 `output`, of this shape."""
    staged = {name: device.zeros(array.shape, array.dtype.type) for name, array in inputs.items()}
    for name, array in inputs.items():
        staged[name][...] = array
    result = device.zeros(shape, np.float32)
    device.upload(*staged.values())()
    engine.bind(staged, {output: result}, once=True)()
    device.download(result)()
    device.wait()
    return result
