"""Whole images per second, through `Pipeline.generate`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from specdec_rt import Pipeline

__all__ = ["MODES", "measure_throughput"]

MODES: dict[str, dict[str, Any]] = {
    "target": {"mode": "target"},
    "exact": {"mode": "exact"},
    "self": {"mode": "exact", "draft": "self"},
}


def measure_throughput(pipeline: Pipeline, batches: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """A record for each batch size and mode, from requests of one batch each.

    Every request is first made once, untimed, with the same seed: then all shapes that it meets have been captured.
    """
    classes = pipeline.bundle.manifest.classes
    for batch in batches:
        labels = np.arange(batch) % classes
        for name, options in MODES.items():
            seconds: list[float] = []
            acceptance: list[float] = []
            for seed in range(1, repeats + 1):
                for counted in (False, True):
                    stats = pipeline.generate(labels, seed=seed, batch_size=batch, **options).stats
                    if counted:
                        seconds.append(stats.seconds)
                        acceptance += [] if stats.acceptance_rate is None else [stats.acceptance_rate]
            yield {
                "mode": name,
                "batch": batch,
                "requests": repeats,
                "images_per_second": round(batch / float(np.median(seconds)), 3),
                "seconds": [round(value, 5) for value in seconds],
                "acceptance_rate": round(float(np.mean(acceptance)), 4) if acceptance else None,
            }
