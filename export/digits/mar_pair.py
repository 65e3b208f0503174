"""The MAR pair: its sizes and its training, on the causal pair's chain."""

from pathlib import Path

import torch
from rich.progress import Progress

from export.digits.causal_pair import CHAIN, provenance
from export.digits.data import CLASSES, PATCH, SIDE, Digits
from export.digits.distil import distil_adapter
from export.digits.losses import Masked, denoising_loss
from export.digits.training import FitOptions, fit
from export.mar_models import MarPair
from export.models.mar import Mar, MarBackbone, MarSize
from specdec_rt.chain import compile_chain
from specdec_rt.manifest import Defaults

__all__ = ["train_mar_pair"]

DEFAULTS = Defaults(
    mode="exact", draft="adapter", draft_length=4, guidance=2.5, guidance_schedule="constant", ar_steps=24
)

TASK = Masked()
TARGET_FIT = FitOptions(epochs=30)
SMALL_FIT = FitOptions(epochs=12, learning_rate=1.5e-3, seed=1)
ADAPTER_FIT = FitOptions(epochs=7, learning_rate=5e-4, clip=20, seed=2)
DRAWS = 3
"""Random training steps at which each predicted token is noised; all of them share one pass of the backbone."""


def mar_model(
    *, width: int, encoder_depth: int, decoder_depth: int, heads: int, head_width: int, head_depth: int, seed: int
) -> Mar:
    """A freshly initialised model of digits, whose tokens are patches of pixels."""
    torch.manual_seed(seed)
    size = MarSize(
        image=SIDE,
        stride=1,
        patch=PATCH,
        channels=1,
        classes=CLASSES,
        buffer=4,
        encoder_width=width,
        encoder_depth=encoder_depth,
        encoder_heads=heads,
        decoder_width=width,
        decoder_depth=decoder_depth,
        decoder_heads=heads,
        head_width=head_width,
        head_depth=head_depth,
        learned_variance=False,
    )
    return Mar(size)


def train_mar_pair(data: Digits, work: Path, progress: Progress) -> MarPair:
    """Train the target and the draft `small` on the data, then distil the draft `adapter`."""
    target = mar_model(width=192, encoder_depth=3, decoder_depth=4, heads=6, head_width=256, head_depth=3, seed=0)
    loss = denoising_loss(target, TASK, context_std=CHAIN.final_std, draws=DRAWS)
    fit(target, loss, data, TARGET_FIT, work / "target.pt", progress)
    small = mar_model(width=96, encoder_depth=1, decoder_depth=2, heads=4, head_width=128, head_depth=2, seed=1)
    loss = denoising_loss(small, TASK, context_std=CHAIN.final_std, draws=DRAWS)
    fit(small, loss, data, SMALL_FIT, work / "small.pt", progress)
    adapter = MarBackbone(small.size, adapter_dim=target.z_dim)
    distil_adapter(adapter, small, target, TASK, compile_chain(CHAIN), data, ADAPTER_FIT, work / "adapter.pt", progress)
    return MarPair(
        name="digits-mar",
        target=target,
        drafts={"adapter": adapter, "small": small},
        chain=CHAIN,
        defaults=DEFAULTS,
        vae=None,
        provenance=provenance(
            "python -m export.digits --family mar --out specdec_rt/assets/digits-mar",
            {"target": TARGET_FIT.epochs, "small": SMALL_FIT.epochs, "adapter": ADAPTER_FIT.epochs},
        ),
    )
