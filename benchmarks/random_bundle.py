"""A bundle of a published MAR size with seeded random weights: its images are noise, but cost what real ones do.

`python -m benchmarks.random_bundle mar_base DIR`.
"""

import sys
from pathlib import Path

from benchmarks.mar_sizes import randomise
from export.mar_models import MarPair, write_mar_bundle
from export.models.mar import PRESETS, Mar
from specdec_rt.chain import ChainSpec
from specdec_rt.config import SELF_DRAFT
from specdec_rt.manifest import Defaults

__all__ = ["random_bundle"]

CHAIN = ChainSpec(steps=100, t_max=975, final_std=0.05, emit="mean")
"""As long as the published one, but fit for every mode."""
GUIDANCE = 3.0


def random_bundle(preset: str, folder: Path) -> None:
    """Export the bundle to `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = Mar(PRESETS[preset])
    randomise(model, seed=0)
    pair = MarPair(
        name=preset,
        target=model,
        drafts={},
        chain=CHAIN,
        defaults=Defaults(
            mode="exact",
            draft=SELF_DRAFT,
            draft_length=4,
            guidance=GUIDANCE,
            guidance_schedule="linear",
            ar_steps=64,
        ),
        vae=None,
        provenance={"weights": "random"},
    )
    write_mar_bundle(pair, folder, precision="fp32")


if __name__ == "__main__":
    random_bundle(sys.argv[1], Path(sys.argv[2]))
