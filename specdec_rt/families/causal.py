"""The causal raster-order family: one token per AR step, keys and values cached."""

import numpy as np

from specdec_rt.engine import BoundCall, Engine
from specdec_rt.families.span import Span
from specdec_rt.manifest import CacheShape
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["CausalBackbone"]


class CausalBackbone:
    """A backbone on its engine, with the caches of the B images of one batch.

    Where guidance is on, each image has G = 2 rows in the engine: its label's, then the dropped label's.
    """

    def __init__(
        self,
        engine: Engine,
        cache: CacheShape,
        z_dim: int,
        labels: IntArray,
        null_label: int,
        *,
        branches: int,
        slots: int,
    ) -> None:
        self._engine = engine
        self._z_dim = z_dim
        self._branches = branches
        self._labels = np.concatenate([labels, np.full_like(labels, null_label)][:branches])
        shape = (len(self._labels), cache.heads, slots, cache.head_dim)
        self._caches = {
            f"{kind}_{layer}": np.zeros(shape, np.float32) for layer in range(cache.layers) for kind in ("key", "value")
        }
        self._calls: dict[int, tuple[BoundCall, Array, Array, Array]] = {}

    def condition(self, tokens: FloatArray, span: Span) -> FloatArray:
        """As in `Backbone`; advances the caches over the span's steps."""
        place = span.step[:, None] + np.arange(span.length)  # AR steps are places here
        before = np.minimum(place, tokens.shape[1]) - 1  # at place 0 any value does: the label stands there
        z = self.feed(tokens[np.arange(len(tokens))[:, None], before], span.step)
        return np.asarray(z[:, span.owner, span.offset])

    def catch_up(self, tokens: FloatArray, step: IntArray) -> int:
        """As in `Backbone`: all but the last token, which the next call feeds; all images stand at one step."""
        count = int(step.max())
        if count == 0:
            return 0
        before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, : count - 1]], axis=1)
        self.feed(before, np.zeros_like(step))
        return 1

    def feed(self, tokens: FloatArray, position: IntArray) -> FloatArray:
        """Conditions for N positions of each image, from `position [B]` on; advances the caches.

        `tokens [B, N, D]` are those *before* each position (at position 0 any value: the label stands
        there). Returns `z [G, B, N, Z]`, a view that the next call overwrites.
        """
        batch, length, _ = tokens.shape
        if length not in self._calls:
            self._calls[length] = self._bind(length, tokens.shape[2])
        call, token_buffer, position_buffer, z = self._calls[length]
        token_buffer.reshape(self._branches, batch, length, -1)[:] = tokens
        position_buffer.reshape(self._branches, batch)[:] = position
        call()
        return z.reshape(self._branches, batch, length, -1)

    def select(self, rows: IntArray) -> None:
        """Keep only these images of the batch, in this order."""
        batch = len(self._labels) // self._branches
        kept = np.concatenate([rows + branch * batch for branch in range(self._branches)])
        self._labels = self._labels[kept]
        self._caches = {name: cache[kept] for name, cache in self._caches.items()}
        self._calls.clear()

    def _bind(self, length: int, token_dim: int) -> tuple[BoundCall, Array, Array, Array]:
        rows = len(self._labels)
        tokens = np.zeros((rows, length, token_dim), np.float32)
        position = np.zeros(rows, np.int64)
        z = np.empty((rows, length, self._z_dim), np.float32)
        inputs: dict[str, Array] = {"tokens": tokens, "position": position, "label": self._labels, **self._caches}
        # The updated caches land where the old ones lie: nothing is copied between calls.
        outputs: dict[str, Array] = {"z": z, **{f"{name}_out": cache for name, cache in self._caches.items()}}
        return self._engine.bind(inputs, outputs), tokens, position, z
