"""PyTorch as a backend: the runtime's own steps with torch's kernels, eager or as torch's CUDA graphs.

What is compared is then the same work: the same steps on the same buffers and random numbers, launched alike.
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
from specdec_rt.types import Array, FloatArray

__all__ = ["TorchBackend", "TorchDevice"]

KEPT_SHAPES = 1024
"""As on `CudaDevice`."""
_DTYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.bool_): torch.bool,
}


@dataclass(frozen=True, eq=False)
class _Move:
    """An upload or a download, which a captured step leaves outside its graph."""

    kind: Literal["up", "down"]
    pairs: list[tuple[Tensor, Tensor]]
    """to, from"""

    def __call__(self) -> None:
        for to, of in self.pairs:
            to.copy_(of, non_blocking=True)


class TorchDevice:
    """As in `base.Device`, on a torch device; sizes are padded as on `CudaDevice`.

    On a GPU host arrays are pinned. A captured step moves what goes up, then replays its graph, then moves what
    comes down: what a program with static input tensors does.
    """

    def __init__(self, device: str, *, batch_buckets: Sequence[int], graphs: bool) -> None:
        self.name = torch.device(device)
        self.cuda = self.name.type == "cuda"
        self.graphs = graphs and self.cuda
        self.kept_shapes = KEPT_SHAPES
        self._buckets = tuple(batch_buckets)
        self._begins: list[int] = []
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        """host address → host tensor, twin; kept until the device goes"""
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None  # graphs work one after the other

    def activate(self) -> None:
        """As in `base.Device`; torch does so by itself."""

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:
        """As in `base.Device`."""
        kind = _DTYPES[np.dtype(dtype)]
        host = torch.zeros(shape, dtype=kind, pin_memory=self.cuda and staged)
        twin = torch.zeros(shape, dtype=kind, device=self.name)
        self._entries[host.data_ptr()] = (host, twin)
        insort(self._begins, host.data_ptr())
        return np.asarray(host.numpy())

    def aligned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """As in `base.Device`; torch takes any part of an array."""
        return self.zeros(shape, dtype)

    def twin(self, view: Array) -> Tensor:
        """The twin of an array or of a view."""
        at = view.ctypes.data
        begin = self._begins[bisect_right(self._begins, at) - 1]
        _, twin = self._entries[begin]
        assert at < begin + max(twin.numel() * twin.element_size(), 1), "an array that is none of the device's"
        strides = [stride // view.itemsize for stride in view.strides]
        return torch.as_strided(twin, view.shape, strides, (at - begin) // view.itemsize)

    def upload(self, *arrays: Array) -> BoundCall:
        """As in `base.Device`."""
        return _Move("up", [(self.twin(array), self._host(array)) for array in arrays])

    def download(self, *arrays: Array) -> BoundCall:
        """As in `base.Device`."""
        return _Move("down", [(self._host(array), self.twin(array)) for array in arrays])

    def _host(self, view: Array) -> Tensor:
        begin = self._begins[bisect_right(self._begins, view.ctypes.data) - 1]
        host, _ = self._entries[begin]
        strides = [stride // view.itemsize for stride in view.strides]
        return torch.as_strided(host, view.shape, strides, (view.ctypes.data - begin) // view.itemsize)

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """As in `base.Device`."""
        to, of = self.twin(destination), self.twin(np.broadcast_to(source, destination.shape))
        return lambda: _ignore(to.copy_(of))

    def gather(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """As in `base.Device`."""
        to, of, rows = self.twin(destination), self.twin(source), self.twin(index)
        return lambda: _ignore(torch.index_select(of, 0, rows, out=to))

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """As in `base.Device`."""
        to, of, rows = self.twin(destination), self.twin(source), self.twin(index)
        return lambda: _ignore(to.index_copy_(0, rows, of))

    def recur(
        self, path: Array, mean: Array, noise: Array, held: tuple[Array, Array], factors: FloatArray
    ) -> BoundCall:
        """As in `base.Device`."""
        states, means, normals = (self.twin(array) for array in (path, mean, noise))
        first, second = (self.twin(array) for array in held)

        def call() -> None:
            for each, (of_state, of_first, of_second, std) in enumerate(factors.tolist()):
                made = of_state * states[each].double() + of_first * first.double() + of_second * second.double()
                means[each] = made
                states[each + 1] = made + std * normals[each].double()

        return call

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
        """As in `base.Device`: all steps of all rows, of which those outside of a row's window change nothing."""
        states, means, normals, last = (self.twin(array) for array in (path, mean, noise, state))
        next_state, first_mean, at, end, table = (self.twin(array) for array in (*made, *window, factors))
        rows, length = torch.arange(len(states), device=states.device), means.shape[1]

        def call() -> None:
            on, first = (at < end)[:, None], at.clamp(max=length - 1)
            held = table[first, 3:4] * states[rows, first] + table[first, 4:5] * first_mean
            means[rows, first] = torch.where(on, first_mean, means[rows, first])
            states[rows, first + 1] = torch.where(on, next_state, states[rows, first + 1])
            value = torch.where(on, next_state, last)
            for step in range(1, length):
                inside = ((at < step) & (step < end))[:, None]
                around = table[step, :1] * value + table[step, 1:2] * held
                value = torch.where(inside, (around + table[step, 2:3] * normals[:, step]).float(), value)
                means[:, step] = torch.where(inside, around.float(), means[:, step])
                states[:, step + 1] = torch.where(inside, value, states[:, step + 1])
            last.copy_(value)

        return call

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """As in `base.Device`."""
        return _Step(calls, self._capture if self.graphs else None)

    def _capture(self, calls: Sequence[BoundCall]) -> BoundCall:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            for call in calls:
                call()
        return graph.replay

    def wait(self) -> None:
        """As in `base.Device`."""
        if self.cuda:
            torch.cuda.synchronize()

    def batch_bucket(self, images: int) -> int:
        """As on `CudaDevice`."""
        return next((bucket for bucket in self._buckets if bucket >= images), images)

    def bucketed(self, count: int, limit: int) -> int:
        """As on `CudaDevice`."""
        return next(size for size in (-(-limit // 4), -(-limit // 2), limit) if size >= count)


class _Step:
    """Calls of one step: what goes up, the work (captured after its first run), what comes down."""

    def __init__(self, calls: Sequence[BoundCall], capture: Callable[[Sequence[BoundCall]], BoundCall] | None) -> None:
        moves = [call for call in calls if isinstance(call, _Move)]
        # What goes up is written by nothing else, so it may go first.
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
    """A bound call returns nothing."""


@dataclass(frozen=True)
class TorchBackend:
    """As in `engine.Backend`: the bundle's own weights in the modules that its graphs were exported from."""

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
    """A module; as in `base.Engine`."""

    in_place = True

    def __init__(self, device: TorchDevice, graph: TorchGraph) -> None:
        self._device, self._graph = device, graph
        self.inputs, self.outputs = frozenset(graph.inputs), frozenset(graph.outputs)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002  # the protocol's
        """As in `base.Engine`."""
        given = [self._device.twin(inputs[name]) for name in self._graph.inputs]
        wanted = [self._device.twin(outputs[name]) for name in self._graph.outputs]
        module = self._graph.module

        def call() -> None:
            for to, of in zip(wanted, module(*given), strict=True):
                if of.data_ptr() != to.data_ptr():  # caches are updated in place
                    to.copy_(of)

        return call
