"""A step captured as a CUDA graph: its calls run one by one the first time, and are replayed from then on."""

from collections.abc import Sequence
from typing import Any

from specdec_rt.backends.base import BoundCall
from specdec_rt.errors import BackendError

__all__ = ["CapturedStep"]


class CapturedStep:
    """Calls that are queued on one stream, each by itself or, with `capture`, all by one launch of a graph.

    The first run is never captured: engines allocate workspaces and load kernels when they first run, which a
    capture forbids. Buffers never move, so a captured graph stays right for as long as the step lives.
    """

    def __init__(self, stream: Any, calls: Sequence[BoundCall], *, capture: bool) -> None:  # noqa: ANN401  # cuda.core's
        self._stream = stream
        self._calls = tuple(calls)
        self._capture = capture
        self._graph: Any = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.launch(self._stream)
            return
        for call in self._calls:
            call()
        if self._capture:
            self._stream.sync()
            self._graph = self._make_graph()

    def _make_graph(self) -> Any:  # noqa: ANN401  # cuda.core.graph.Graph
        builder = self._stream.create_graph_builder()
        try:
            builder.begin_building()
            for call in self._calls:
                call()
            graph = builder.end_building().complete()
        except Exception as error:  # the driver's errors have a type of their own
            raise BackendError(
                f"a step cannot be captured as a CUDA graph: {error}; run without graphs (--no-cuda-graph)"
            ) from error
        finally:
            builder.close()  # ends a capture that failed half-way, too
        graph.upload(self._stream)
        return graph
