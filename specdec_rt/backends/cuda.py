"""Buffers in a GPU's memory with pinned host twins, and the small moves between engines, all on one stream."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.backends.device_allocations import DeviceAllocations
from specdec_rt.backends.graph import Recording
from specdec_rt.backends.kernels import KERNELS, compile_kernels
from specdec_rt.errors import BackendError
from specdec_rt.types import Array

__all__ = ["CudaDevice"]

THREADS = 256
MOST_AXES = 4
"""of a copy between views, as the kernel is written"""
KEPT_SHAPES = 1024
ALIGNMENT = 256
"""bytes, of what an engine is bound to: what TensorRT asks for"""
SCRATCH_BYTES = 2**26
"""at least; a larger one is made where an engine needs it"""


class CudaDevice:
    """As in `base.Device`, on GPU `ordinal`.

    Batches are padded to one of `batch_buckets` (ascending), other sizes to a quarter of their limit, half of it
    or all, so that few shapes are captured. Without `graphs` the same calls run one by one.
    """

    def __init__(self, *, batch_buckets: Sequence[int], graphs: bool, ordinal: int = 0) -> None:
        from cuda import core  # heavy, and absent where there is no GPU
        from cuda.bindings import driver

        self._core, self._driver = core, driver
        try:
            self._device = core.Device(ordinal)
            self.activate()
            self.stream = self._device.create_stream()
        except Exception as error:  # the driver's errors have types of their own
            raise BackendError(f"GPU {ordinal} cannot be used: {error}; see `specdec-rt doctor`") from error
        self.graphs = graphs
        self.kept_shapes = KEPT_SHAPES  # padded sizes are few, and a captured step is dear to make
        self._buckets = tuple(batch_buckets)
        self._pinned = core.LegacyPinnedMemoryResource()
        self._twins = DeviceAllocations()
        self._dropped: list[Any] = []
        """buffers that nobody holds any more, to be given back when no work is outstanding"""
        self._scratch: list[Any] = []
        self._kernels = compile_kernels(core, self._device.arch)

    def activate(self) -> None:
        """As in `base.Device`."""
        self._device.set_current()

    # --- memory ---------------------------------------------------------------------------------------

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:
        """As in `base.Device`."""
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        memory = self._allocate(size)
        memory.fill(0, stream=self.stream)
        pinned = self._pinned.allocate(size) if staged else None
        if pinned is None:
            array = np.empty(shape, dtype)  # never touched: no memory stands behind its addresses
        else:
            array = np.ndarray(shape, dtype, buffer=memoryview((ctypes.c_char * size).from_address(int(pinned.handle))))
            array[...] = 0

        # The collector may drop an array at any time, in the midst of a capture too.
        dropped = self._dropped
        buffers = [memory] if pinned is None else [memory, pinned]
        self._twins.add(array, int(memory.handle), lambda: dropped.extend(buffers))
        return array

    def scratch(self, size: int) -> int:
        """The address of so many bytes that all engines share, one after the other."""
        if not self._scratch or self._scratch[-1].size < size:
            # Recordings may hold the smaller ones.
            self._scratch.append(self._allocate(max(size, SCRATCH_BYTES)))
        return int(self._scratch[-1].handle)

    def _allocate(self, size: int) -> Any:  # noqa: ANN401  # cuda.core.Buffer
        try:
            return self._device.allocate(size, stream=self.stream)
        except Exception as error:  # as above
            raise BackendError(
                f"the GPU cannot give {size / 1e6:.1f} MB more: {error}; take a smaller batch, or a recipe with "
                "smaller batch_buckets or draft_length"
            ) from error

    def address(self, array: Array) -> int:
        """The device address of an array's twin. Raises BackendError where it has none, or has gaps."""
        if not array.flags.c_contiguous:
            raise BackendError(f"an array {array.dtype} {array.shape} has gaps; an engine takes contiguous buffers")
        address = self._twins.address(array)
        assert address % ALIGNMENT == 0 or not array.size, "a part of an array that is not pitched"
        return address

    def upload(self, *arrays: Array) -> BoundCall:
        """As in `base.Device`."""
        moves = [(self._twins.address(array), array.ctypes.data, _extent(array)) for array in arrays]
        return self._memory_copies(moves, arrays)

    def download(self, *arrays: Array) -> BoundCall:
        """As in `base.Device`."""
        moves = [(array.ctypes.data, self._twins.address(array), _extent(array)) for array in arrays]
        return self._memory_copies(moves, arrays)

    def _memory_copies(self, moves: list[tuple[int, int, int]], kept: tuple[Array, ...]) -> BoundCall:
        driver, stream = self._driver, self._driver.CUstream(int(self.stream.handle))

        def call() -> None:
            assert kept is not None  # the arrays live as long as what is bound to them
            for destination, source, size in moves:
                # One address space: the driver sees which side is the host's.
                self._check(driver.cuMemcpyAsync(destination, source, size, stream), "copy between host and device")

        return call

    def aligned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """As in `base.Device`; the gaps belong to nobody, and are moved along."""
        length, *inner = shape
        values = math.prod(inner)
        pitch = -(-values * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT // np.dtype(dtype).itemsize
        rows = self.zeros((length, pitch), dtype)[:, :values]
        return rows.reshape(shape)

    # --- kernels --------------------------------------------------------------------------------------

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """As in `base.Device`."""
        source = np.broadcast_to(source, destination.shape)
        if destination.ndim > MOST_AXES:
            raise BackendError(f"a copy of {destination.ndim} axes; at most {MOST_AXES} are supported")
        lead = MOST_AXES - destination.ndim
        shape = [1] * lead + list(destination.shape)
        strides = [
            [0] * lead + [stride // array.itemsize for stride in array.strides] for array in (destination, source)
        ]
        return self._launch(
            "copy_view",
            destination.size,
            (destination, source),
            [np.int64(n) for n in (*shape[1:], *strides[0], *strides[1])],
        )

    def gather(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """As in `base.Device`."""
        width = np.int64(source.shape[1])
        return self._launch("gather_rows", destination.size, (destination, source, index), [width])

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """As in `base.Device`."""
        width = np.int64(source.shape[1])
        return self._launch("scatter_rows", source.size, (destination, source, index), [width])

    def linear_recurrence(
        self,
        path: Array,
        mean: Array,
        normals: Array,
        evaluated: tuple[Array, Array, Array],
        window: tuple[Array, Array],
        coefficients: Array,
    ) -> BoundCall:
        """Transitions on a held x̂₀: one launch, a thread for each value of a state."""
        arrays = (path, mean, normals, *evaluated, *window, coefficients)
        return self._launch("linear_recurrence", evaluated[0].size, arrays, [np.int64(n) for n in mean.shape[1:]])

    def _launch(self, name: str, count: int, arrays: tuple[Array, ...], numbers: list[Any]) -> BoundCall:
        """Kernel `name` over `count` values: the addresses of `arrays`, the count, then `numbers`."""
        assert name in KERNELS
        config = self._core.LaunchConfig(grid=max(-(-count // THREADS), 1), block=THREADS)
        kernel, stream, launch = self._kernels[name], self.stream, self._core.launch
        arguments = [*(np.uint64(self._twins.address(array)) for array in arrays), np.int64(count), *numbers]

        def call() -> None:
            assert arrays is not None  # as above
            launch(stream, config, kernel, *arguments)

        return call

    # --- steps ----------------------------------------------------------------------------------------

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """As in `base.Device`."""
        return Recording(self.stream, calls, capture=self.graphs)

    def wait(self) -> None:
        """As in `base.Device`."""
        try:
            self.stream.sync()
        except Exception as error:  # the driver's errors have a type of their own
            raise BackendError(f"the GPU failed while it worked: {error}; start the process anew") from error
        while self._dropped:
            self._dropped.pop().close()

    def batch_bucket(self, images: int) -> int:
        """The smallest bucket that holds so many; itself beyond the largest."""
        return next((bucket for bucket in self._buckets if bucket >= images), images)

    def bucketed(self, count: int, limit: int) -> int:
        """A quarter of `limit`, half of it or all: few sizes are captured, and at most half the work is wasted."""
        return next(size for size in (-(-limit // 4), -(-limit // 2), limit) if size >= count)

    def _check(self, answer: tuple[Any, ...], what: str) -> None:
        if int(answer[0]):
            raise BackendError(f"CUDA refused a {what}: {answer[0].name}")


def _extent(array: Array) -> int:
    """Bytes from an array's first value to its last, those in the gaps of a pitched one among them."""
    if array.flags.c_contiguous:
        return int(array.nbytes)
    if not array[0].flags.c_contiguous or array.strides[0] % ALIGNMENT:
        raise BackendError(f"an array {array.dtype} {array.shape} has gaps; only whole or pitched ones can be moved")
    return int((array.shape[0] - 1) * array.strides[0] + array[0].nbytes)
