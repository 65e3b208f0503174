"""MAR's family (arXiv 2406.11838): sets of tokens in random order, bidirectional attention, no cache."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import Device, Engine
from specdec_rt.families.backbone import Backbone, BackboneCall
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["MarBackbone"]


@dataclass(frozen=True)
class _Inputs:
    """What the host fills, `[G, C, …]`."""

    visible: Array
    visible_mask: Array
    label: Array
    query: Array
    token_index: Array


class MarBackbone(Backbone):
    """A backbone without caches: every AR step of an image is a *context*, the tokens known before it.

    Contexts are padded to the largest one under a mask, so that images at different steps, and several steps of one
    image, run in one call. With guidance each context has G = 2 rows: its label's, then the dropped label's.
    """

    def __init__(
        self,
        device: Device,
        engine: Engine,
        z_dim: int,
        null_label: int,
        *,
        branches: int,
        tokens: int,
        token_dim: int,
    ) -> None:
        super().__init__(device, engine, z_dim, null_label, branches=branches)
        self._tokens, self._token_dim = tokens, token_dim
        self._call = lru_cache(maxsize=device.kept_shapes)(self._make_call)

    def prepare(self, positions: PositionBatch, copy: int = 0) -> tuple[BackboneCall, IntArray]:
        """Fill the call for these positions: one context for each image and AR step among them."""
        images, bucketed = len(positions.first_step), self._device.bucketed
        pairs, context = np.unique(positions.offset * images + positions.image_index, return_inverse=True)  # [C], [R]
        contexts = bucketed(len(pairs), images * positions.length)
        pairs = np.concatenate([pairs, np.full(contexts - len(pairs), pairs[0])])
        offset, image = np.divmod(pairs, images)
        step = positions.first_step[image] + offset
        known, size = positions.known[step], positions.known[step + 1] - positions.known[step]
        most_known = bucketed(max(int(known.max()), 1), self._tokens)  # an engine may dislike a size of 0
        queries = bucketed(int(size.max()), int(np.diff(positions.known).max()))
        call, inputs = self._call(contexts, most_known, queries, copy)
        inputs.visible[:] = positions.order[image, :most_known]
        inputs.visible_mask[:] = np.arange(most_known) < known[:, None]
        # A context with fewer tokens to predict asks for some of them twice.
        inputs.query[:] = positions.order[image[:, None], known[:, None] + np.arange(queries) % size[:, None]]
        inputs.label[:] = self._labels[:, image]
        inputs.token_index[:] = image
        branch = np.arange(self.branches)[:, None]
        return call, (branch * contexts + context) * queries + positions.rank - known[context]

    def catch_up(self, order: IntArray, known: IntArray, tokens: FloatArray, steps: int) -> int:  # noqa: ARG002
        """A backbone without caches has nothing to catch up with."""
        return 0

    def _make_call(
        self,
        contexts: int,
        most_known: int,
        queries: int,
        copy: int,  # noqa: ARG002  # tells buffers of one shape apart
    ) -> tuple[BackboneCall, _Inputs]:
        device, branches = self._device, self.branches
        rows = branches * contexts
        tokens = device.zeros((rows, self._tokens, self._token_dim), np.float32, staged=False)
        visible, query = (device.zeros((rows, size), np.int64) for size in (most_known, queries))
        visible_mask = device.zeros((rows, most_known), np.bool_)
        label, token_index = (device.zeros((rows,), np.int64) for _ in range(2))
        z = device.zeros((rows, queries, self.z_dim), np.float32)
        run = self._engine.bind(
            {"tokens": tokens, "visible": visible, "visible_mask": visible_mask, "label": label, "query": query},
            {"z": z},
        )
        staged = (visible, visible_mask, label, query, token_index)
        call = BackboneCall(
            inputs=staged,
            tokens=tokens.reshape(rows, -1),
            token_index=token_index,
            z=z.reshape(rows * queries, -1),
            calls=(run,),
        )
        branched = [array.reshape(branches, contexts, *array.shape[1:]) for array in staged]
        visible, visible_mask, label, query, token_index = branched
        return call, _Inputs(visible, visible_mask, label, query, token_index)
