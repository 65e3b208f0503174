"""A step captured as a CUDA graph: its calls run one by one the first time, and are replayed from then on."""

from collections.abc import Sequence
from typing import Any

from specdec_rt.backends.base import BoundCall
from specdec_rt.errors import BackendError

__all__ = ["Recording"]


class Recording:
    """Calls that are queued on one stream; where they are captured, by one launch.

    The first run is eager: engines settle what they do lazily (workspaces, kernels), none of which a capture
    allows. Buffers never move, so what is captured stays right for as long as the recording lives.
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
            self._graph = self._captured()

    def _captured(self) -> Any:  # noqa: ANN401  # cuda.core.graph.Graph
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
