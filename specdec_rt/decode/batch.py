"""The slots of a batch: images are admitted to them, free slots are backfilled, and the batch is compacted at its end.

An image that is being made has a slot of its own in the models' buffers. There may be more slots than images under way:
batches come in the sizes that launches are captured for. A slot without work stands past the last AR step.
"""

import numpy as np

from specdec_rt.decode.round import RowInputs
from specdec_rt.decode.session import Session
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import Draws, TokenNoise
from specdec_rt.plan import Plan
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Batch"]


class Batch:
    """The images of a request, `slots` of them at a time: `labels [B]`, and the keys of their noise, `images [B]`."""

    def __init__(
        self, session: Session, plan: Plan, draws: Draws, labels: IntArray, images: IntArray, slots: int
    ) -> None:
        head = session.primary_model.head
        self._session, self._plan, self._draws = session, plan, draws
        self._labels, self._image_keys, self._most = labels, images, slots
        self._transitions, dim = head.chain.length, head.token_dim
        self._order = plan.draw_order(draws, images)
        self.shown = np.zeros((len(images), plan.tokens, dim), np.float32)
        """`[B, L, D]` the tokens to show"""
        self._admitted = 0
        """images that have, or had, a slot"""
        self._allocate(0)

    def _allocate(self, slots: int) -> None:
        """So many slots, none of which has work yet."""
        tokens, dim = self.shown.shape[1:]
        self.image_of_slot = np.full(slots, self._admitted)
        """`[A]`"""
        self.ar_step = np.full(slots, self._plan.schedule.steps)
        """`[A]` the AR step that each slot makes next"""
        self.tokens = np.zeros((slots, tokens, dim), np.float32)
        """`[A, L, D]` the tokens that each slot's image goes on from"""
        self._normals = np.zeros((slots, tokens, self._transitions + 1, dim), np.float32)
        """`[A, L, n + 1, D]` the noise of each token's chain, drawn when its image is admitted"""

    def __len__(self) -> int:
        """A, the number of slots."""
        return len(self.image_of_slot)

    @property
    def under_way(self) -> BoolArray:
        """`[A]` which slots have tokens to make."""
        return np.asarray(self.ar_step < self._plan.schedule.steps)

    @property
    def waiting(self) -> int:
        """Images that have had no slot yet."""
        return len(self._image_keys) - self._admitted

    # --- images come and go -----------------------------------------------------------------------------

    def admit(self) -> None:
        """Begin anew with the next images that wait."""
        count = min(self._most, self.waiting)
        self._allocate(self._session.device.batch_bucket(count))
        self._place(np.arange(count))

    def backfill(self) -> None:
        """Give free slots to images that wait."""
        under_way = self.under_way
        free = np.flatnonzero(~under_way)[: min(self.waiting, self._most - int(under_way.sum()))]
        if len(free):
            self._place(free)

    def compact(self) -> None:
        """Drop slots without work, as far as a smaller batch is of use."""
        under_way = self.under_way
        slots = self._session.device.batch_bucket(int(under_way.sum()))
        if not under_way.any() or slots >= len(self):
            return
        idle = np.flatnonzero(~under_way)[: slots - int(under_way.sum())]
        kept = np.sort(np.concatenate([np.flatnonzero(under_way), idle]))
        self.image_of_slot, self.ar_step = self.image_of_slot[kept], self.ar_step[kept]
        self.tokens, self._normals = self.tokens[kept], self._normals[kept]
        for model in self._session.models:
            model.backbone.keep(kept)

    def _place(self, slots: IntArray) -> None:
        """Let the next images begin in these slots."""
        self.image_of_slot[slots] = self._admitted + np.arange(len(slots))
        self.ar_step[slots], self.tokens[slots] = 0, 0
        self._admitted += len(slots)
        keys, (_, tokens, dim) = self._image_keys[self.image_of_slot[slots]], self.tokens.shape
        of_tokens = TokenNoise(self._draws, np.repeat(keys, tokens), np.tile(np.arange(tokens), len(slots)))
        noise = of_tokens.chain(self._transitions, dim)
        self._normals[slots] = noise.reshape(len(slots), *self._normals.shape[1:])
        for model in self._session.models:  # what a slot's last image left in caches lies after all that is read
            model.backbone.begin(self._labels[self.image_of_slot])

    # --- rows -------------------------------------------------------------------------------------------

    def next_rows(self, length: int) -> RowInputs:
        """The next `length` AR steps of all slots."""
        positions = PositionBatch.of(self.order, self._plan.schedule.known, self.ar_step, length)
        normals = self._normals[positions.image_index, positions.position]
        return RowInputs(positions, self.tokens, normals, self._plan.guidance_at(positions.ar_step))

    @property
    def order(self) -> IntArray:
        """`[A, L]` each slot's positions in the order in which they are predicted."""
        return np.asarray(self._order[self.image_of_slot])

    def noise(self, positions: PositionBatch) -> TokenNoise:
        """The other draws of the rows' tokens."""
        return TokenNoise(self._draws, self._image_keys[self.image_of_slot[positions.image_index]], positions.position)

    def store(self, positions: PositionBatch, rows: BoolArray | IntArray, token: FloatArray, mean: FloatArray) -> None:
        """Commit the tokens `[J, D]` of some rows; `mean [J, D]` is shown where the chain shows means."""
        slot, position = positions.image_index[rows], positions.position[rows]
        self.tokens[slot, position] = token
        self.shown[self.image_of_slot[slot], position] = mean if self._plan.emit_mean else token
