"""Arguments on which graphs are traced, and then compared with torch.

The tracer takes a size of 0 or 1 for fixed, and two equal sizes for one: so all sizes here are above 1, and no two
are equal.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from export.models.head import DiffusionHead
from specdec_rt.manifest import GraphName

__all__ = ["EXAMPLE_IMAGES", "EXAMPLE_INPUTS", "example_draws", "head_examples"]

EXAMPLE_IMAGES, EXAMPLE_INPUTS = 3, 4
EXAMPLE_ROWS, EXAMPLE_STEPS, EXAMPLE_PAIRS, EXAMPLE_BRANCHES = 5, 6, 8, 2


def example_draws() -> Callable[..., Tensor]:
    """A function that draws normal values of a given shape, the same ones in every export."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def head_examples(head: DiffusionHead, *, learned_variance: bool) -> dict[GraphName, list[Any]]:
    """Arguments of each graph of a head, in the order of its bindings."""
    dim, normal = head.token_dim, example_draws()
    coefficients = normal(EXAMPLE_STEPS, 4)
    if learned_variance:
        coefficients[:, 2:] = coefficients[:, 2:].abs()
        coefficients[-1, 2:] = 0  # as in the last transition of a stock chain
    z = normal(EXAMPLE_BRANCHES, EXAMPLE_ROWS, head.z_dim)
    guidance = normal(EXAMPLE_BRANCHES, EXAMPLE_ROWS)
    time_table = normal(EXAMPLE_STEPS, head.width)
    modulation = normal(EXAMPLE_ROWS, EXAMPLE_BRANCHES, head.modulation_width)
    pairs = torch.arange(EXAMPLE_PAIRS)
    step = torch.arange(EXAMPLE_STEPS - EXAMPLE_ROWS, EXAMPLE_STEPS)
    return {
        GraphName.TIME_EMBEDDING: [torch.arange(0, 900, 150)],
        GraphName.MODULATION: [z, pairs % EXAMPLE_ROWS, time_table, pairs % EXAMPLE_STEPS],
        GraphName.DENOISE_STEP: [
            normal(EXAMPLE_ROWS, dim),
            modulation,
            guidance,
            coefficients,
            step,
            normal(EXAMPLE_ROWS, dim),
        ],
        GraphName.PATH_MEANS: [
            normal(EXAMPLE_ROWS, EXAMPLE_STEPS + 1, dim),
            normal(EXAMPLE_STEPS, EXAMPLE_ROWS, EXAMPLE_BRANCHES, head.modulation_width),
            guidance,
            coefficients,
        ],
    }
