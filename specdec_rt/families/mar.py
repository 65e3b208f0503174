"""MAR's family (arXiv 2406.11838): sets of tokens in random order, bidirectional attention, no cache."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import Device, Engine
from specdec_rt.families.backbone import Ask, Backbone
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, IntArray

__all__ = ["MarBackbone"]


@dataclass(frozen=True)
class _Inputs:
    """What the host stages, `[G, C, …]`."""

    visible: Array
    visible_mask: Array
    label: Array
    query: Array
    token_index: Array


class MarBackbone(Backbone):
    """A backbone that keeps nothing.

    Every AR step is evaluated in a context of its own: the tokens known before it, padded to the fullest
    context's number under a mask, so images at different steps, and several steps of one image, run in
    one call. Where guidance is on, each context has G = 2 rows: its label's, then the dropped label's.
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
        self._ask = lru_cache(maxsize=device.kept_shapes)(self._make_ask)

    def ask(self, span: PositionBatch, slot: int = 0) -> tuple[Ask, IntArray]:
        """As in `Backbone`."""
        images, bucketed = len(span.step), self._device.bucketed
        pairs, context = np.unique(span.offset * images + span.owner, return_inverse=True)  # [C], [R]
        contexts = bucketed(len(pairs), images * span.length)
        pairs = np.concatenate([pairs, np.full(contexts - len(pairs), pairs[0])])
        offset, owner = np.divmod(pairs, images)
        known, after = span.known[span.step[owner] + offset], span.known[span.step[owner] + offset + 1]
        size = after - known
        most_known = bucketed(max(int(known.max()), 1), self._tokens)  # an engine may dislike a size of 0
        queries = bucketed(int(size.max()), int(np.diff(span.known).max()))
        ask, inputs = self._ask(contexts, most_known, queries, slot)
        inputs.visible[:] = span.order[owner, :most_known]
        inputs.visible_mask[:] = np.arange(most_known) < known[:, None]
        # A context with fewer tokens to predict asks for some of them twice.
        inputs.query[:] = span.order[owner[:, None], known[:, None] + np.arange(queries) % size[:, None]]
        inputs.label[:] = self._labels[:, owner]
        inputs.token_index[:] = owner
        branch = np.arange(self.branches)[:, None]
        return ask, (branch * contexts + context) * queries + span.rank - known[context]

    def catch_up(self, order: IntArray, known: IntArray, steps: int) -> Ask | None:  # noqa: ARG002  # the protocol's
        """As in `Backbone`: there is nothing to catch up with."""
        return None

    def _make_ask(self, contexts: int, most_known: int, queries: int, slot: int) -> tuple[Ask, _Inputs]:  # noqa: ARG002  # slot is a key
        device, branches = self._device, self.branches
        rows = branches * contexts
        tokens = device.zeros((rows, self._tokens, self._token_dim), np.float32, staged=False)
        visible, query = (device.zeros((rows, size), np.int64) for size in (most_known, queries))
        visible_mask = device.zeros((rows, most_known), np.bool_)
        label, token_index = (device.zeros((rows,), np.int64) for _ in range(2))
        z = device.zeros((rows, queries, self.z_dim), np.float32)
        call = self._engine.bind(
            {"tokens": tokens, "visible": visible, "visible_mask": visible_mask, "label": label, "query": query},
            {"z": z},
        )
        staged = (visible, visible_mask, label, query, token_index)
        ask = Ask(
            inputs=staged,
            tokens=tokens.reshape(rows, -1),
            token_index=token_index,
            z=z.reshape(rows * queries, -1),
            calls=(call,),
        )
        branched = [array.reshape(branches, contexts, *array.shape[1:]) for array in staged]
        visible, visible_mask, label, query, token_index = branched
        return ask, _Inputs(visible, visible_mask, label, query, token_index)
