"""The causal raster-order family: one token per AR step, keys and values cached."""

import math
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import Device, Engine
from specdec_rt.families.backbone import Backbone, BackboneCall
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.manifest import CacheShape
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["CausalBackbone"]


class CausalBackbone(Backbone):
    """A backbone with the caches of the images of one batch, with room for `cache_positions` each.

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
        cache_positions: int,
        tokens: int,
        token_dim: int,
    ) -> None:
        super().__init__(device, engine, z_dim, null_label, branches=branches)
        self._tokens, self._token_dim = tokens, token_dim
        self._row_shape = (cache.heads, cache_positions, cache.head_dim)
        self._names = [f"{kind}_{layer}" for layer in range(cache.layers) for kind in ("key", "value")]
        self._caches: dict[str, Array] = {}
        self._updated: dict[str, Array] = {}
        """where updated caches go, for a backend that cannot write them in place"""
        self._moved: tuple[Array, Array]
        """which cache rows are kept when a batch is compacted, and room for those of one cache on their way"""
        self._call = lru_cache(maxsize=device.kept_shapes)(self._make_call)

    def begin(self, labels: IntArray) -> None:
        """Turn to the images with `labels [A]`. Old cache entries may stay: what lies after a query is masked."""
        super().begin(labels)
        rows = len(labels) * self.branches
        if not self._caches or len(self._caches[self._names[0]]) < rows:
            self._call.cache_clear()
            zeros, shape = self._device.zeros, (rows, *self._row_shape)
            self._caches = {name: zeros(shape, np.float32, staged=False) for name in self._names}
            if not self._engine.in_place:
                self._updated = {name: zeros(shape, np.float32, staged=False) for name in self._names}
            self._moved = zeros((rows,), np.int64), zeros((rows, math.prod(self._row_shape)), np.float32, staged=False)

    def keep(self, slots: IntArray) -> None:
        """Keep only these slots: the cache rows of their images move to the front."""
        super().keep(slots)
        moved = (slots[:, None] * self.branches + np.arange(self.branches)).ravel()
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

    def prepare(self, positions: PositionBatch, copy: int = 0) -> tuple[BackboneCall, IntArray]:
        """Fill the call for these positions, which will write the keys and values of the tokens that it is fed."""
        images, length = len(positions.first_step), positions.length
        call, position, label = self._call(images, length, copy)
        base, branch = _grid(images, self._tokens, self.branches)
        # Images that are finished stay at their last position: their rows mean nothing, but must lie inside.
        first = np.minimum(positions.first_step, self._tokens - 1)  # an AR step makes one token
        predicted = first[:, None] + np.arange(length)
        # A position is predicted from the token before it; the first one from the label, whatever token is fed.
        rows = base + np.minimum(np.maximum(predicted, 1), self._tokens) - 1
        call.token_index.reshape(images, self.branches, length)[:] = rows[:, None]
        position.reshape(images, self.branches)[:] = first[:, None]
        label.reshape(images, self.branches)[:] = self._labels.T
        return call, (positions.image_index * self.branches + branch) * length + positions.offset

    def catch_up(self, order: IntArray, known: IntArray, tokens: FloatArray, steps: int) -> int:
        """Fill the caches with all these tokens but the last, which the next call feeds anyway."""
        if steps:
            self.condition(tokens, PositionBatch.of(order, known, np.zeros(len(order), np.int64), steps))
        return int(steps > 0)

    def feed(self, tokens: FloatArray, position: IntArray) -> FloatArray:
        """Conditions `[G, A, N, Z]` for N positions of each image, from `position [A]` on; advances the caches.

        `tokens [A, N, D]` are those *before* each position (at position 0 any value: the label stands there).
        """
        images, length, _ = tokens.shape
        every = np.zeros((images, self._tokens, self._token_dim), np.float32)
        every[np.arange(images)[:, None], np.maximum(position[:, None] + np.arange(length) - 1, 0)] = tokens
        order = np.tile(np.arange(self._tokens), (images, 1))
        positions = PositionBatch.of(order, np.arange(self._tokens + 1), position, length)
        z = self.condition(every, positions)
        whole = np.zeros((self.branches, images, length, self.z_dim), np.float32)
        whole[:, positions.image_index, positions.offset] = z
        return whole

    def _make_call(
        self,
        images: int,
        length: int,
        copy: int,  # noqa: ARG002  # tells buffers of one shape apart
    ) -> tuple[BackboneCall, Array, Array]:
        device, rows = self._device, images * self.branches
        tokens = device.zeros((rows, length, self._token_dim), np.float32, staged=False)
        position, label = device.zeros((rows,), np.int64), device.zeros((rows,), np.int64)
        token_index = device.zeros((rows * length,), np.int64)
        z = device.zeros((rows, length, self.z_dim), np.float32)
        caches = {name: cache[:rows] for name, cache in self._caches.items()}
        # Where the backend allows it updated caches land where the old ones lie: nothing is copied between calls.
        updated = caches if self._engine.in_place else {name: self._updated[name][:rows] for name in caches}
        outputs = {"z": z, **{f"{name}_out": cache for name, cache in updated.items()}}
        run = self._engine.bind({"tokens": tokens, "position": position, "label": label, **caches}, outputs)
        copies = () if updated is caches else tuple(device.copy(caches[name], updated[name]) for name in caches)
        call = BackboneCall(
            inputs=(position, label, token_index),
            tokens=tokens.reshape(rows * length, -1),
            token_index=token_index,
            z=z.reshape(rows * length, -1),
            calls=(run, *copies),
        )
        return call, position, label


@lru_cache(maxsize=64)
def _grid(images: int, tokens: int, branches: int) -> tuple[IntArray, IntArray]:
    """Each image's first row in the token buffer `[A, 1]`, and the branches `[G, 1]`. Neither is ever written to."""
    base, branch = np.arange(images)[:, None] * tokens, np.arange(branches)[:, None]
    base.flags.writeable = branch.flags.writeable = False
    return base, branch
