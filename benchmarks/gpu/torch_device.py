"""PyTorch as a backend: the runtime's own launches with torch's kernels, eager or as torch's CUDA graphs.

So what is compared is the same work: the same launches, on the same buffers and random numbers.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.torch_graphs import TorchGraph, torch_graphs
from specdec_rt.backends.base import BoundCall, Engine, Limits
from specdec_rt.bundle import Bundle
from specdec_rt.manifest import Precision
from specdec_rt.types import Array

__all__ = ["TorchBackend", "TorchDevice"]

KEPT_SHAPES = 1024
"""For how many shapes buffers and recordings are kept: as many as on `CudaDevice`."""
_DTYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.bool_): torch.bool,
}


@dataclass(frozen=True, eq=False)
class _Move:
    """An upload or a download. A captured launch leaves it outside its graph."""

    kind: Literal["up", "down"]
    pairs: list[tuple[Tensor, Tensor]]
    """destinations and sources"""

    def __call__(self) -> None:
        for to, of in self.pairs:
            to.copy_(of, non_blocking=True)


class TorchDevice:
    """A torch device as the runtime's `Device`. Sizes are padded as on `CudaDevice`.

    On a GPU host arrays are pinned. A captured launch uploads, then replays its graph, then downloads: what a program
    with static input tensors does.
    """

    def __init__(self, device: str, *, batch_buckets: Sequence[int], graphs: bool) -> None:
        self.name = torch.device(device)
        self.cuda = self.name.type == "cuda"
        self.graphs = graphs and self.cuda
        self.kept_shapes = KEPT_SHAPES
        self._buckets = tuple(batch_buckets)
        self._begins: list[int] = []
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        """host address → host tensor, device buffer; kept until the device goes"""
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None  # graphs work one after the other

    def activate(self) -> None:
        """Nothing: torch does it by itself."""

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:
        """An array of zeros and its device buffer. Only the host side of a `staged` one is pinned."""
        kind = _DTYPES[np.dtype(dtype)]
        host = torch.zeros(shape, dtype=kind, pin_memory=self.cuda and staged)
        buffer = torch.zeros(shape, dtype=kind, device=self.name)
        self._entries[host.data_ptr()] = (host, buffer)
        insort(self._begins, host.data_ptr())
        return np.asarray(host.numpy())

    def stage(self, values: Array) -> Array:
        """A copy of the values, and its device buffer."""
        array = self.zeros(values.shape, values.dtype.type)
        array[...] = values
        return array

    def aligned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """An array of zeros: torch takes any part of one."""
        return self.zeros(shape, dtype)

    def buffer(self, view: Array) -> Tensor:
        """The device buffer of an array, or of a view of one."""
        at = view.ctypes.data
        begin = self._begins[bisect_right(self._begins, at) - 1]
        _, buffer = self._entries[begin]
        assert at < begin + max(buffer.numel() * buffer.element_size(), 1), "an array that is none of the device's"
        strides = [stride // view.itemsize for stride in view.strides]
        return torch.as_strided(buffer, view.shape, strides, (at - begin) // view.itemsize)

    def upload(self, *arrays: Array) -> BoundCall:
        """Copies arrays to their device buffers."""
        return _Move("up", [(self.buffer(array), self._host(array)) for array in arrays])

    def download(self, *arrays: Array) -> BoundCall:
        """Copies device buffers to their arrays."""
        return _Move("down", [(self._host(array), self.buffer(array)) for array in arrays])

    def _host(self, view: Array) -> Tensor:
        begin = self._begins[bisect_right(self._begins, view.ctypes.data) - 1]
        host, _ = self._entries[begin]
        strides = [stride // view.itemsize for stride in view.strides]
        return torch.as_strided(host, view.shape, strides, (view.ctypes.data - begin) // view.itemsize)

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """Copies one device buffer to another, broadcast to its shape."""
        to, of = self.buffer(destination), self.buffer(np.broadcast_to(source, destination.shape))
        return lambda: _ignore(to.copy_(of))

    def gather(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination = source[index]`, by rows."""
        to, of, rows = self.buffer(destination), self.buffer(source), self.buffer(index)
        return lambda: _ignore(torch.index_select(of, 0, rows, out=to))

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination[index] = source`, by rows."""
        to, of, rows = self.buffer(destination), self.buffer(source), self.buffer(index)
        return lambda: _ignore(to.index_copy_(0, rows, of))

    def linear_recurrence(
        self,
        path: Array,
        mean: Array,
        normals: Array,
        evaluated: tuple[Array, Array, Array],
        window: tuple[Array, Array],
        coefficients: Array,
    ) -> BoundCall:
        """Transitions on a held x̂₀: one product for all rows, of which steps outside a row's window change nothing."""
        states, means, noise = self.buffer(path)[:, 1:], self.buffer(mean), self.buffer(normals)[:, 1:]
        before, after, evaluated_mean = (self.buffer(array) for array in evaluated)
        (begin, end), table = (self.buffer(array) for array in window), self.buffer(coefficients)
        row, step = (torch.arange(size, device=self.name) for size in means.shape[:2])

        def call() -> None:
            active = (begin < end)[:, None]
            at_begin, held = (
                active & (step == begin[:, None]),
                (begin[:, None] < step) & (step < end[:, None]),
            )  # [R, n]
            at_begin, held = at_begin[..., None], held[..., None]
            of_state, of_x0, std = table[:, 0], table[:, 1:2], table[:, 2:3]
            at = table[begin.clamp(max=len(step) - 1)]
            x0_pred = at[:, 3:4] * before + at[:, 4:5] * evaluated_mean
            drawn = std * noise
            added = torch.where(held, of_x0 * x0_pred[:, None] + drawn, 0) + torch.where(at_begin, after[:, None], 0)
            # [j, h] what a state made by transition j has been multiplied with after transition h.
            factor = torch.where(step > step[:, None], of_state, 1.0).cumprod(1).triu()
            made = torch.einsum("jh,rjd->rhd", factor, added)
            means.copy_(torch.where(held, made - drawn, torch.where(at_begin, evaluated_mean[:, None], means)))
            states.copy_(torch.where(held | at_begin, made, states))
            after.copy_(torch.where(active, made[row, (end - 1).clamp(min=0)], before))

        return call

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """All calls as one launch."""
        return _Launch(calls, self._capture if self.graphs else None)

    def _capture(self, calls: Sequence[BoundCall]) -> BoundCall:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            for call in calls:
                call()
        return graph.replay

    def wait(self) -> None:
        """Return when everything queued is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def batch_bucket(self, images: int) -> int:
        """The smallest bucket that holds so many images; `images` itself beyond the largest."""
        return next((bucket for bucket in self._buckets if bucket >= images), images)

    def bucketed(self, count: int, limit: int) -> int:
        """A quarter of `limit`, half of it or all."""
        return next(size for size in (-(-limit // 4), -(-limit // 2), limit) if size >= count)


class _Launch:
    """The calls of one launch: uploads, the work (captured after its first run), downloads."""

    def __init__(self, calls: Sequence[BoundCall], capture: Callable[[Sequence[BoundCall]], BoundCall] | None) -> None:
        moves = [call for call in calls if isinstance(call, _Move)]
        # Nothing else writes to what is uploaded, so uploads may go first.
        self._up = [move for move in moves if move.kind == "up"]
        self._down = [move for move in moves if move.kind == "down"]
        self._work = [call for call in calls if not isinstance(call, _Move)]
        self._capture = capture

    @torch.no_grad()
    def __call__(self) -> None:
        calls: list[BoundCall] = [*self._up, *self._work, *self._down]
        for call in calls:
            call()
        if self._capture is not None and self._work:
            # torch wants a warm-up before it captures; it has had one now.
            self._work, self._capture = [self._capture(self._work)], None


def _ignore(_: Tensor) -> None:
    """Drop what torch returns: a bound call returns nothing."""


@dataclass(frozen=True)
class TorchBackend:
    """PyTorch as the runtime's `Backend`: the bundle's weights in the modules that its graphs were exported from."""

    device: TorchDevice
    graphs: Mapping[Path, TorchGraph]
    limits: Limits = field(default_factory=Limits)
    name: str = "pytorch"

    @classmethod
    def open(cls, bundle: Bundle, device: TorchDevice, precision: Precision) -> "TorchBackend":
        """Load the bundle's models onto the device."""
        return cls(device, torch_graphs(bundle, device.name, precision))

    def load(self, path: Path) -> Engine:
        """The engine of the graph at `path`."""
        return TorchEngine(self.device, self.graphs[path])


class TorchEngine:
    """A torch module as the runtime's `Engine`."""

    in_place = True

    def __init__(self, device: TorchDevice, graph: TorchGraph) -> None:
        self._device, self._graph = device, graph
        self.inputs, self.outputs = frozenset(graph.inputs), frozenset(graph.outputs)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002  # the protocol's
        """A call of the module that reads these inputs and copies its results to these outputs."""
        given = [self._device.buffer(inputs[name]) for name in self._graph.inputs]
        wanted = [self._device.buffer(outputs[name]) for name in self._graph.outputs]
        module = self._graph.module

        def call() -> None:
            for to, of in zip(wanted, module(*given), strict=True):
                if of.data_ptr() != to.data_ptr():  # caches are updated in place
                    to.copy_(of)

        return call
