"""Compare `target` mode with `exact` mode: the same distribution, another amount of work.

python examples/compare_modes.py [IMAGES]

On a CPU with two cores and models as small as these, no draft beats the target alone (see the section "Speed" of the
README). What speculation saves is calls that have to wait for one another, at the price of more arithmetic.
"""

import sys
from typing import Any

import numpy as np

import specdec_rt

WAYS: dict[str, dict[str, Any]] = {
    "target": {"mode": "target"},
    "exact, draft adapter, 4 tokens a round": {"mode": "exact", "draft": "adapter", "draft_length": 4},
    "exact, the target's own head drafts": {"mode": "exact", "draft": "self"},
}


def main(images: int) -> None:
    pipeline = specdec_rt.load("digits")
    labels = np.arange(images) % 10
    tokens = images * pipeline.bundle.manifest.tokens
    print(f"{'':40} {'seconds':>8} {'accepted':>9}  calls per token: target backbone, head in sequence")
    for name, options in WAYS.items():
        pipeline.generate(labels, seed=0, **options)  # the first request makes engines and buffers
        stats = pipeline.generate(labels, seed=1, **options).stats
        accepted = "" if stats.acceptance_rate is None else f"{stats.acceptance_rate:.2f}"
        calls = f"{stats.target_backbone_calls / tokens:.2f}, {stats.sequential_head_calls / tokens:.1f}"
        print(f"{name:40} {stats.seconds:8.3f} {accepted:>9}  {calls}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
