"""Where baselines take their random numbers from: torch, or the runtime's draws where tokens are compared."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec_rt.noise import NoiseSource, Purpose

__all__ = ["Noise", "RuntimeNoise", "TorchNoise"]


class Noise(Protocol):
    """Random numbers of one batch."""

    def order(self, images: int, tokens: int) -> Tensor:
        """`[B, L]` each image's positions in the order in which they are predicted."""
        ...

    def chain(self, image: Tensor, position: Tensor, length: int, dim: int) -> Tensor:
        """`[R, n + 1, D]` normals for the chains of the tokens at `position [R]` of `image [R]`; the first is x_T."""
        ...


class TorchNoise:
    """torch's generator, as the public code uses it."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def order(self, images: int, tokens: int) -> Tensor:
        """A random order for each image."""
        return torch.rand(images, tokens, generator=self._generator).argsort(dim=1)

    def chain(self, image: Tensor, position: Tensor, length: int, dim: int) -> Tensor:  # noqa: ARG002  # the protocol's
        """Normals of torch's generator: the next ones, whichever the tokens are."""
        return torch.randn(len(image), length + 1, dim, generator=self._generator)


class RuntimeNoise:
    """What the runtime draws for images 0, 1, … of a request with this seed."""

    def __init__(self, seed: int) -> None:
        self._draws = NoiseSource(seed)

    def order(self, images: int, tokens: int) -> Tensor:
        """The order that the runtime draws."""
        keys = np.arange(images)
        uniform = self._draws.uniform(keys, np.zeros_like(keys), Purpose.ORDER, tokens)
        return torch.from_numpy(np.argsort(uniform, axis=1, kind="stable"))

    def chain(self, image: Tensor, position: Tensor, length: int, dim: int) -> Tensor:
        """The normals that the runtime draws."""
        return torch.from_numpy(self._draws.normal(image.numpy(), position.numpy(), Purpose.CHAIN, length + 1, dim))
