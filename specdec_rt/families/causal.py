"""The causal raster-order family: one token per AR step, keys and values cached."""

import math
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import Device, Engine
from specdec_rt.families.backbone import Ask, Backbone
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.manifest import CacheShape
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["CausalBackbone"]


class CausalBackbone(Backbone):
    """A backbone with the caches of the images of one batch, `slots` places each.

    Images' rows stand together in the engine, so a smaller batch is a contiguous part of a larger one.
    """

    def __init__(
        self,
        device: Device,
        engine: Engine,
        cache: CacheShape,
        z_dim: int,
        null_label: int,
        *,
        branches: int,
        slots: int,
        tokens: int,
        token_dim: int,
    ) -> None:
        super().__init__(device, engine, z_dim, null_label, branches=branches)
        self._tokens, self._token_dim = tokens, token_dim
        self._row_shape = (cache.heads, slots, cache.head_dim)
        self._names = [f"{kind}_{layer}" for layer in range(cache.layers) for kind in ("key", "value")]
        self._caches: dict[str, Array] = {}
        self._updated: dict[str, Array] = {}
        """where a backend puts updated caches that cannot put them back in place"""
        self._moved: tuple[Array, Array]
        """where cache rows come from when some are left out, and one cache's, on their way"""
        self._ask = lru_cache(maxsize=device.kept_shapes)(self._make_ask)

    def begin(self, labels: IntArray) -> None:
        """As in `Backbone`; what is left in the caches is never read: slots after a query's own are masked."""
        super().begin(labels)
        rows = len(labels) * self.branches
        if not self._caches or len(self._caches[self._names[0]]) < rows:
            self._ask.cache_clear()
            zeros, shape = self._device.zeros, (rows, *self._row_shape)
            self._caches = {name: zeros(shape, np.float32, staged=False) for name in self._names}
            if not self._engine.in_place:
                self._updated = {name: zeros(shape, np.float32, staged=False) for name in self._names}
            self._moved = zeros((rows,), np.int64), zeros((rows, math.prod(self._row_shape)), np.float32, staged=False)

    def select(self, images: IntArray) -> None:
        """As in `Backbone`."""
        super().select(images)
        moved = (images[:, None] * self.branches + np.arange(self.branches)).ravel()
        if (moved == np.arange(len(moved))).all():
            return
        device = self._device
        index, kept = (array[: len(moved)] for array in self._moved)
        index[:] = moved
        device.upload(index)()
        for cache in self._caches.values():
            rows = cache.reshape(len(cache), -1)
            device.gather(kept, rows, index)()
            device.copy(rows[: len(moved)], kept)()
        device.wait()  # before the index is written again

    def ask(self, span: PositionBatch, slot: int = 0) -> tuple[Ask, IntArray]:
        """As in `Backbone`; advances the caches over the span's steps."""
        images, length = len(span.step), span.length
        ask, position, label = self._ask(images, length, slot)
        base, branch = _grid(images, self._tokens, self.branches)
        # Images that are done, or will be, stay at their last place: their rows mean nothing, but must lie inside.
        first = np.minimum(span.step, self._tokens - 1)  # AR steps are places here
        place = first[:, None] + np.arange(length)
        before = np.minimum(np.maximum(place, 1), self._tokens) - 1  # at place 0 any value does: the label stands there
        rows = base + before
        ask.token_index.reshape(images, self.branches, length)[:] = rows[:, None]
        position.reshape(images, self.branches)[:] = first[:, None]
        label.reshape(images, self.branches)[:] = self._labels.T
        return ask, (span.owner * self.branches + branch) * length + span.offset

    def catch_up(self, order: IntArray, known: IntArray, steps: int) -> Ask | None:
        """As in `Backbone`: all but the last token, which the next call feeds."""
        return self.ask(PositionBatch.of(order, known, np.zeros(len(order), np.int64), steps))[0] if steps else None

    def feed(self, tokens: FloatArray, position: IntArray) -> FloatArray:
        """Conditions `[G, A, N, Z]` for N positions of each image, from `position [A]` on; advances the caches.

        `tokens [A, N, D]` are those *before* each position (at position 0 any value: the label stands there).
        """
        images, length, _ = tokens.shape
        canvas = np.zeros((images, self._tokens, self._token_dim), np.float32)
        place = np.maximum(position[:, None] + np.arange(length) - 1, 0)
        canvas[np.arange(images)[:, None], place] = tokens
        order = np.tile(np.arange(self._tokens), (images, 1))
        span = PositionBatch.of(order, np.arange(self._tokens + 1), position, length)
        z = self.condition(canvas, span)
        whole = np.zeros((self.branches, images, length, self.z_dim), np.float32)
        whole[:, span.owner, span.offset] = z
        return whole

    def _make_ask(self, images: int, length: int, slot: int) -> tuple[Ask, Array, Array]:  # noqa: ARG002  # slot is a key
        device, rows = self._device, images * self.branches
        tokens = device.zeros((rows, length, self._token_dim), np.float32, staged=False)
        position, label = device.zeros((rows,), np.int64), device.zeros((rows,), np.int64)
        token_index = device.zeros((rows * length,), np.int64)
        z = device.zeros((rows, length, self.z_dim), np.float32)
        caches = {name: cache[:rows] for name, cache in self._caches.items()}
        # Where the backend allows it updated caches land where the old ones lie: nothing is copied between calls.
        updated = caches if self._engine.in_place else {name: self._updated[name][:rows] for name in caches}
        outputs = {"z": z, **{f"{name}_out": cache for name, cache in updated.items()}}
        call = self._engine.bind({"tokens": tokens, "position": position, "label": label, **caches}, outputs)
        copies = () if updated is caches else tuple(device.copy(caches[name], updated[name]) for name in caches)
        ask = Ask(
            inputs=(position, label, token_index),
            tokens=tokens.reshape(rows * length, -1),
            token_index=token_index,
            z=z.reshape(rows * length, -1),
            calls=(call, *copies),
        )
        return ask, position, label


@lru_cache(maxsize=64)
def _grid(images: int, tokens: int, branches: int) -> tuple[IntArray, IntArray]:
    """Where each image begins on the canvas `[A, 1]`, and the branches `[G, 1]`; neither is ever written to."""
    base, branch = np.arange(images)[:, None] * tokens, np.arange(branches)[:, None]
    base.flags.writeable = branch.flags.writeable = False
    return base, branch
