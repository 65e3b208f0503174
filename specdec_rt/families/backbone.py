"""What both families are asked: conditions for the rows of a span, from tokens that lie on the device."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from specdec_rt.backends.base import BoundCall, Device, Engine
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["Ask", "Backbone"]


@dataclass(frozen=True, eq=False)
class Ask:
    """A call of a backbone on static buffers.

    The host stages `inputs`; what it feeds of the tokens is gathered on the device, from a *canvas*
    `[A, L, D]` of all images' tokens, so that tokens drafted there never pass through the host.
    """

    inputs: tuple[Array, ...]
    """everything but the tokens, `token_index` included"""
    tokens: Array
    """`[N, W]` rows of the canvas seen as rows of W values"""
    token_index: Array
    """`[N]` which rows"""
    z: Array
    """`[M, Z]` all conditions that the call gives"""
    calls: tuple[BoundCall, ...]
    """the engine's, and what must follow it"""

    def run(self, device: Device, canvas: Array) -> list[BoundCall]:
        """Gather and call; the inputs have been uploaded."""
        rows = canvas.reshape(-1, self.tokens.shape[1])
        return [device.gather(self.tokens, rows, self.token_index), *self.calls]


class Backbone(ABC):
    """A backbone on its engine, with what it keeps for the images of one batch.

    Where guidance is on, each image has G = 2 rows in the engine: its label's, and the dropped label's.
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
        """Turn to a new batch: the labels of its images `[A]`, none of which has a token yet."""
        self._labels = np.stack([labels, np.full_like(labels, self._null_label)][: self.branches])

    def select(self, images: IntArray) -> None:
        """Keep only these images of the batch, in this (ascending) order."""
        self._labels = self._labels[:, images]

    @abstractmethod
    def ask(self, span: PositionBatch, slot: int = 0) -> tuple[Ask, IntArray]:
        """A call whose inputs are staged for the span, and the rows of its z, `[G, R]`, that are the span's.

        Calls of one shape share their buffers unless they have different slots.
        """

    @abstractmethod
    def catch_up(self, order: IntArray, known: IntArray, steps: int) -> Ask | None:
        """The staged call that takes in what another model made of A images' first AR steps; None where none is needed.

        `order [A, L]` and `known [S + 1]` as in `PositionBatch`.
        """

    def condition(self, tokens: FloatArray, span: PositionBatch) -> FloatArray:
        """Conditions `[G, R, Z]` of the span's rows, one call for itself.

        `tokens [A, L, D]`: every token of the steps before a row's own stands at its place.
        """
        device = self._device
        canvas = device.zeros(tokens.shape, np.float32)
        canvas[:] = tokens
        ask, rows = self.ask(span)
        device.record([device.upload(canvas, *ask.inputs), *ask.run(device, canvas), device.download(ask.z)])()
        device.wait()
        return np.asarray(ask.z[rows])
