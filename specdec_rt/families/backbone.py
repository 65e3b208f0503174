"""What decoding asks of a backbone, whatever the family: conditions for the rows of a `PositionBatch`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from specdec_rt.backends.base import BoundCall, Device, Engine
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["Backbone", "BackboneCall"]


@dataclass(frozen=True, eq=False)
class BackboneCall:
    """A call of a backbone on static buffers.

    The host fills `inputs`. Tokens are gathered on the device, from a *token buffer* `[A, L, D]` that holds all
    images' tokens, so that tokens drafted there never pass through the host.
    """

    inputs: tuple[Array, ...]
    """everything but the tokens; `token_index` is among them"""
    tokens: Array
    """`[rows, values]` what is gathered: rows of the token buffer, seen as rows of so many values"""
    token_index: Array
    """`[rows]` which rows of the token buffer"""
    z: Array
    """`[conditions, Z]` all conditions that the call gives"""
    calls: tuple[BoundCall, ...]
    """the engine's call, and what must follow it"""

    def run(self, device: Device, token_buffer: Array) -> list[BoundCall]:
        """Gather the tokens and call the engine; `inputs` have been uploaded before."""
        rows = token_buffer.reshape(-1, self.tokens.shape[1])
        return [device.gather(self.tokens, rows, self.token_index), *self.calls]


class Backbone(ABC):
    """A backbone on its engine, with what it keeps for the images of one batch.

    With guidance each image has G = 2 rows in the engine: one with its label, one with the label dropped.
    """

    def __init__(self, device: Device, engine: Engine, z_dim: int, null_label: int, *, branches: int) -> None:
        self._device = device
        self._engine = engine
        self.z_dim = z_dim
        self.branches = branches
        self._null_label = null_label
        self._labels: IntArray = np.zeros((branches, 0), np.int64)
        """`[G, A]`: the images' labels, then (with guidance) the dropped label"""

    def begin(self, labels: IntArray) -> None:
        """Turn to the images with `labels [A]`. A slot whose image is new reads nothing that an older image left."""
        self._labels = np.stack([labels, np.full_like(labels, self._null_label)][: self.branches])

    def keep(self, slots: IntArray) -> None:
        """Keep only these slots of the batch, in this ascending order."""
        self._labels = self._labels[:, slots]

    @abstractmethod
    def prepare(self, positions: PositionBatch, copy: int = 0) -> tuple[BackboneCall, IntArray]:
        """A call whose inputs are filled for these positions, and the rows `[G, R]` of its `z` that belong to them.

        Calls of one shape share their buffers, unless they ask for different copies.
        """

    @abstractmethod
    def catch_up(self, order: IntArray, known: IntArray, tokens: FloatArray, steps: int) -> int:
        """Take in `tokens [A, L, D]` that another model made in the first AR steps; returns the calls it took.

        `order [A, L]` and `known [T + 1]` as in `PositionBatch`.
        """

    def condition(self, tokens: FloatArray, positions: PositionBatch) -> FloatArray:
        """Conditions `[G, R, Z]` of these positions, in a call of its own.

        In `tokens [A, L, D]` every token of the AR steps before a row's own stands at its position.
        """
        device = self._device
        token_buffer = device.stage(np.asarray(tokens, np.float32))
        call, rows = self.prepare(positions)
        steps = [device.upload(token_buffer, *call.inputs), *call.run(device, token_buffer), device.download(call.z)]
        for step in steps:
            step()
        device.wait()
        return np.asarray(call.z[rows])
