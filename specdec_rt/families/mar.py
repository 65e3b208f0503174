"""MAR's family (arXiv 2406.11838): sets of tokens in random order, bidirectional attention, no cache."""

import numpy as np

from specdec_rt.engine import Engine
from specdec_rt.families.span import Span
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["MarBackbone"]


class MarBackbone:
    """A backbone on its engine.

    Every AR step is evaluated in a context of its own: the tokens known before it, padded to the fullest
    context's number under a mask, so images at different steps, and several steps of one image, run in
    one call. Where guidance is on, each context has G = 2 rows: its label's, then the dropped label's.
    """

    def __init__(self, engine: Engine, z_dim: int, labels: IntArray, null_label: int, *, branches: int) -> None:
        self._engine = engine
        self._z_dim = z_dim
        self._labels = labels
        self._null_label = null_label
        self._branches = branches

    def condition(self, tokens: FloatArray, span: Span) -> FloatArray:
        """As in `Backbone`."""
        starts = np.flatnonzero(np.diff(span.ar_step, prepend=-1) | np.diff(span.owner, prepend=-1))
        context = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(span.owner)))  # [R]
        owner, known = span.owner[starts], span.rank[starts]  # [C]
        size = np.bincount(context)
        most_known = max(int(known.max()), 1)  # an engine may dislike a size of 0
        visible = span.order[owner, :most_known]
        visible_mask = np.arange(most_known) < known[:, None]
        # A context with fewer tokens to predict asks for some of them twice.
        query = span.order[owner[:, None], known[:, None] + np.arange(size.max()) % size[:, None]]
        labels = self._labels[owner]
        z = np.empty((self._branches * len(owner), query.shape[1], self._z_dim), np.float32)
        inputs = {
            "tokens": self._per_branch(tokens[owner]),
            "visible": self._per_branch(visible),
            "visible_mask": self._per_branch(visible_mask),
            "label": np.concatenate([labels, np.full_like(labels, self._null_label)][: self._branches]),
            "query": self._per_branch(query),
        }
        self._engine.bind(inputs, {"z": z})()
        branched = z.reshape(self._branches, len(owner), query.shape[1], -1)
        return np.asarray(branched[:, context, span.rank - known[context]])

    def catch_up(self, tokens: FloatArray, step: IntArray) -> int:  # noqa: ARG002  # the protocol's
        """As in `Backbone`: there is nothing to catch up with."""
        return 0

    def select(self, rows: IntArray) -> None:
        """Keep only these images of the batch, in this order."""
        self._labels = self._labels[rows]

    def _per_branch(self, values: Array) -> Array:
        return np.concatenate([values] * self._branches)
