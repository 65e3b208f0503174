"""A GPU as a device: pinned arrays with device buffers, and the copies between engines, all on one stream."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.backends.cuda_graph import CapturedStep
from specdec_rt.backends.device_allocations import DeviceAllocations
from specdec_rt.backends.kernels import KERNELS, compile_kernels
from specdec_rt.errors import BackendError
from specdec_rt.types import Array

__all__ = ["CudaDevice"]

THREADS = 256
"""of a block"""
MOST_AXES = 4
"""of a copy between views, as the kernel is written"""
KEPT_SHAPES = 1024
ALIGNMENT = 256
"""bytes: what TensorRT asks of the address of a buffer that an engine is bound to"""
SCRATCH_BYTES = 2**26
"""of the scratch memory that engines share; more where an engine needs it"""


class CudaDevice:
    """GPU `ordinal` as a `Device`.

    Few shapes are captured: a batch is padded to one of `batch_buckets` (ascending), other sizes to a quarter, half
    or all of their limit. Without `graphs` nothing is captured: the same calls run one by one.
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
        self.kept_shapes = KEPT_SHAPES  # bucketed sizes are few, and a captured step is expensive to make
        self._buckets = tuple(batch_buckets)
        self._pinned = core.LegacyPinnedMemoryResource()
        self._allocations = DeviceAllocations()
        self._dropped: list[Any] = []
        """buffers of arrays that are gone, to be freed when no work is outstanding"""
        self._scratch: list[Any] = []
        self._kernels = compile_kernels(core, self._device.arch)

    def activate(self) -> None:
        """Make the device current in this thread."""
        self._device.set_current()

    # --- memory ---------------------------------------------------------------------------------------

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:
        """An array of zeros in pinned memory (only with `staged`) and its device buffer, zeros too."""
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        memory = self._allocate(size)
        memory.fill(0, stream=self.stream)
        pinned = self._pinned.allocate(size) if staged else None
        if pinned is None:
            array = np.empty(shape, dtype)  # never touched: no memory stands behind its addresses
        else:
            array = np.ndarray(shape, dtype, buffer=memoryview((ctypes.c_char * size).from_address(int(pinned.handle))))
            array[...] = 0

        # An array may go at any time, also during a capture, which forbids freeing memory.
        dropped = self._dropped
        buffers = [memory] if pinned is None else [memory, pinned]
        self._allocations.add(array, int(memory.handle), lambda: dropped.extend(buffers))
        return array

    def stage(self, values: Array) -> Array:
        """A copy of the values in pinned memory, and its device buffer."""
        array = self.zeros(values.shape, values.dtype.type)
        array[...] = values
        return array

    def scratch(self, size: int) -> int:
        """The address of so many bytes of scratch memory, which all engines use one after the other."""
        if not self._scratch or self._scratch[-1].size < size:
            # The smaller ones stay: captured steps may use them.
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
        """The address of an array's device buffer. Raises BackendError where there is none, or it has gaps."""
        if not array.flags.c_contiguous:
            raise BackendError(f"an array {array.dtype} {array.shape} has gaps; an engine takes contiguous buffers")
        address = self._allocations.address(array)
        assert address % ALIGNMENT == 0 or not array.size, "a part of an array that `aligned` did not make"
        return address

    def upload(self, *arrays: Array) -> BoundCall:
        """Copies arrays to their device buffers."""
        moves = [(self._allocations.address(array), array.ctypes.data, _extent(array)) for array in arrays]
        return self._memory_copies(moves, arrays)

    def download(self, *arrays: Array) -> BoundCall:
        """Copies device buffers to their arrays."""
        moves = [(array.ctypes.data, self._allocations.address(array), _extent(array)) for array in arrays]
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
        """An array of zeros whose entries begin at multiples of `ALIGNMENT`; copies move the gaps along with them."""
        length, *inner = shape
        values, unit = math.prod(inner), ALIGNMENT // np.dtype(dtype).itemsize
        rows = self.zeros((length, -(-values // unit) * unit), dtype)[:, :values]
        return rows.reshape(shape)

    # --- kernels --------------------------------------------------------------------------------------

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """Copies a device buffer to another, broadcast to its shape."""
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
        """`destination = source[index]`, by rows."""
        width = np.int64(source.shape[1])
        return self._launch("gather_rows", destination.size, (destination, source, index), [width])

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination[index] = source`, by rows."""
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
        """Kernel `name` over `count` values; its arguments are the addresses of `arrays`, the count, `numbers`."""
        assert name in KERNELS
        config = self._core.LaunchConfig(grid=max(-(-count // THREADS), 1), block=THREADS)
        kernel, stream, launch = self._kernels[name], self.stream, self._core.launch
        arguments = [*(np.uint64(self._allocations.address(array)) for array in arrays), np.int64(count), *numbers]

        def call() -> None:
            assert arrays is not None  # as above
            launch(stream, config, kernel, *arguments)

        return call

    # --- steps ----------------------------------------------------------------------------------------

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """All calls as one, which is captured as a CUDA graph if the device has `graphs`."""
        return CapturedStep(self.stream, calls, capture=self.graphs)

    def wait(self) -> None:
        """Return when everything queued is done, and free the buffers of arrays that are gone."""
        try:
            self.stream.sync()
        except Exception as error:  # the driver's errors have a type of their own
            raise BackendError(f"the GPU failed while it worked: {error}; start the process anew") from error
        while self._dropped:
            self._dropped.pop().close()

    def batch_bucket(self, images: int) -> int:
        """The smallest batch bucket that fits `images`; `images` itself beyond the largest."""
        return next((bucket for bucket in self._buckets if bucket >= images), images)

    def bucketed(self, count: int, limit: int) -> int:
        """A quarter, half or all of `limit`, the least that fits `count`: so few sizes are captured."""
        return next(size for size in (-(-limit // 4), -(-limit // 2), limit) if size >= count)

    def _check(self, answer: tuple[Any, ...], what: str) -> None:
        if int(answer[0]):
            raise BackendError(f"CUDA refused a {what}: {answer[0].name}")


def _extent(array: Array) -> int:
    """Bytes from an array's first value to its last, with the gaps between the entries of an `aligned` one."""
    if array.flags.c_contiguous:
        return int(array.nbytes)
    if not array[0].flags.c_contiguous or array.strides[0] % ALIGNMENT:
        raise BackendError(
            f"an array {array.dtype} {array.shape} has gaps; only contiguous arrays and those of aligned() can be moved"
        )
    return int((array.shape[0] - 1) * array.strides[0] + array[0].nbytes)
