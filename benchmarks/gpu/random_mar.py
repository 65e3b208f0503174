"""Bundles of the published MAR sizes with seeded random weights, made where they are measured.

    python -m benchmarks.gpu.random_mar --work DIR [--sizes base,large,huge]

MAR-B has no draft: its own head drafts. MAR-L and MAR-H have a MAR-B as their draft. There is no VAE, because steps are
measured, not images. Each graph also comes in fp16.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.mar_sizes import randomise
from export.mar_models import MarPair, write_mar_bundle
from export.models.mar import PRESETS, Mar, MarSize
from specdec_rt.chain import ChainSpec
from specdec_rt.config import SELF_DRAFT
from specdec_rt.manifest import Defaults, Precision

__all__ = ["SIZES", "bundle_folder", "write_random_mar"]

SIZES = ("base", "large", "huge")
DRAFT = "base"
CHAIN = ChainSpec(steps=100, t_max=975, final_std=0.05, emit="mean")
"""As long as the published one, but fit for every mode."""
GUIDANCE = 3.0


def bundle_folder(work: Path, size: str) -> Path:
    """Where the bundle of a size lies."""
    return work / f"mar_{size}"


def write_random_mar(
    name: str,
    target: MarSize,
    draft: MarSize | None,
    out: Path,
    *,
    chain: ChainSpec = CHAIN,
    compute: Sequence[Precision] = ("fp16",),
) -> None:
    """Export a pair with random weights to `out`; its own head drafts where there is no draft."""
    models = []
    for seed, size in enumerate((target, draft)):
        if size is not None:
            models.append(Mar(size))
            randomise(models[-1], seed)
    pair = MarPair(
        name=name,
        target=models[0],
        drafts={"draft": models[1]} if draft is not None else {},
        chain=chain,
        defaults=Defaults(
            mode="exact",
            draft=SELF_DRAFT if draft is None else "draft",
            draft_length=4,
            guidance=GUIDANCE,
            guidance_schedule="linear",
            ar_steps=min(64, target.tokens),
        ),
        vae=None,
        provenance={"weights": "random"},
    )
    write_mar_bundle(pair, out, precision="fp32", compute=compute)


def main() -> None:
    """Export every size asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.random_mar", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where bundles go: 1 GB for base, 3 GB, 5 GB for huge")
    parser.add_argument("--sizes", default=",".join(SIZES))
    given = parser.parse_args()
    for size in given.sizes.split(","):
        draft = None if size == DRAFT else PRESETS[f"mar_{DRAFT}"]
        write_random_mar(f"mar_{size}", PRESETS[f"mar_{size}"], draft, bundle_folder(given.work, size))


if __name__ == "__main__":
    main()
