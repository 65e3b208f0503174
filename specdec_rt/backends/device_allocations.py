"""Which device buffer belongs to an array in host memory."""

import weakref
from bisect import bisect_right, insort
from collections.abc import Callable

from specdec_rt.errors import BackendError
from specdec_rt.types import Array

__all__ = ["DeviceAllocations"]


class DeviceAllocations:
    """Arrays and the addresses of their device buffers. A view lies in the buffer where it lies in its array."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._entries: dict[int, tuple[int, int]] = {}
        """host address → bytes, device address"""

    def add(self, array: Array, address: int, release: Callable[[], None]) -> None:
        """Register a whole, contiguous array; `release` is called once nothing holds it or a view of it."""
        begin = array.ctypes.data
        insort(self._begins, begin)
        self._entries[begin] = (array.nbytes, address)

        def forget() -> None:
            self._begins.remove(begin)
            del self._entries[begin]
            release()

        weakref.finalize(array, forget).atexit = False  # when the process ends, the driver frees all by itself

    def address(self, view: Array) -> int:
        """The device address of a view's first value. Raises BackendError for a view of an unknown array."""
        at = view.ctypes.data
        index = bisect_right(self._begins, at) - 1
        if index >= 0:
            begin = self._begins[index]
            size, address = self._entries[begin]
            if begin <= at < begin + size:
                return address + at - begin
        raise BackendError(f"an array {view.dtype} {view.shape} has no device memory; make it by the device's zeros()")
