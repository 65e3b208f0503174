"""What the host stages for a step: rows padded to sizes that come again, and the buffers that it fills."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import Device
from specdec_rt.decode.draft import ChainNoise
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["Rows", "Staged"]


@dataclass(frozen=True)
class Rows:
    """Where the R rows of a span stand among R' padded ones; padding repeats a row of its AR step."""

    counts: tuple[int, ...]
    """padded rows of each AR step"""
    source: IntArray | slice
    """`[R']` the span's row in each"""
    where: IntArray | slice
    """`[R]` the place of each of the span's rows"""

    @classmethod
    def of(cls, span: PositionBatch, device: Device) -> "Rows":
        widest = len(span.step) * _largest(span.known.tobytes())
        counts = span.counts
        padded = tuple(device.bucketed(count, widest) for count in counts)
        if padded == counts:
            return cls(padded, slice(None), slice(None))
        padded = (max(padded),) * len(counts)  # one shape less to capture
        first, begin = np.cumsum(counts) - counts, np.cumsum(padded) - padded
        inside = [np.minimum(np.arange(wide), count - 1) for wide, count in zip(padded, counts, strict=True)]
        source = np.concatenate([start + rows for start, rows in zip(first, inside, strict=True)])
        return cls(padded, source, np.arange(sum(counts)) + np.repeat(begin - first, counts))

    @property
    def slices(self) -> list[slice]:
        """The padded rows of each AR step."""
        ends = np.cumsum(self.counts).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]


@lru_cache(maxsize=16)
def _largest(known: bytes) -> int:
    """Tokens of a schedule's largest AR step; `known` as in `ArSchedule`, its bytes."""
    return int(np.diff(np.frombuffer(known, np.int64)).max())


@dataclass(frozen=True, eq=False)
class Staged:
    """What the host fills for a step of R' rows of A images."""

    canvas: Array
    """`[A, L, D]` tokens committed, and in a round those drafted since"""
    normals: Array
    """`[R', n + 1, D]`"""
    guidance: Array
    """`[G, R']`"""
    place: Array
    """`[R']` row of the canvas that a drafted token goes to"""

    def fill(
        self, span: PositionBatch, rows: Rows, tokens: FloatArray, noise: ChainNoise, guidance: FloatArray
    ) -> None:
        """Stage what belongs to the span's rows; `tokens [A, L, D]`."""
        self.canvas[:] = tokens
        self.normals[:, 0], self.normals[:, 1:] = noise.start[rows.source], noise.steps[rows.source]
        self.guidance[:] = guidance[:, rows.source]
        self.place[:] = (span.owner * self.canvas.shape[1] + span.place)[rows.source]

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.canvas, self.normals, self.guidance, self.place)
