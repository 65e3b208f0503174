"""A chain's numbers and an image's tokens in the form in which the published code records them."""

from typing import Any

import numpy as np

from export.reference import RecordingError
from specdec_rt.chain import Chain
from specdec_rt.types import FloatArray

__all__ = ["betas", "unpatchify", "variances"]


def betas(chain: Chain) -> FloatArray:
    """`[n]`: β of each transition of the respaced chain, the least noisy first."""
    alpha_bar: FloatArray = 1 / np.square(chain.prediction_state[::-1])
    return np.asarray(1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]]))


def variances(chain: Chain) -> FloatArray:
    """`[n, 2]`: σ and the range of log σ, before temperature.

    The published code records them for the last transition, too, at which the stock chain adds no noise.
    """
    found: FloatArray = chain.coefficients[:, 2:] / np.array([chain.spec.temperature, 1])
    last = chain.final_density_std / chain.spec.temperature
    learned = chain.spec.variance == "learned"
    found[-1] = last, np.log(betas(chain)[0]) / 2 - np.log(last) if learned else 0
    return found


def unpatchify(tokens: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """`tokens [B, L, D]`, in raster order, as latents `[B, C, h, w]`; a token's values are channel by channel.

    C, h and w are those of `shape`. Raises RecordingError where the tokens do not tile it.
    """
    _, channels, height, width = shape
    channels = max(channels, 1)
    patch = max(round((tokens.shape[2] / channels) ** 0.5), 1)
    grid: Any = (len(tokens), height // patch, width // patch, channels, patch, patch)
    if tokens.size != np.prod(grid):
        raise RecordingError(f"the recorded image is {list(shape)}; {list(tokens.shape)} tokens do not tile it")
    return np.asarray(tokens.reshape(grid).transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width))
