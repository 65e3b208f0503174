"""A small trunk made to drive the target's head: least squares first, then the path KL."""

from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

from export.digits.data import CLASSES, Digits
from export.digits.training import FitOptions, fit, path_divergence_loss, prepare_tokens
from export.models.causal import CausalBackbone, CausalModel
from specdec_rt.schedule import Chain

__all__ = ["distil_adapter"]

LEAST_SQUARES_IMAGES = 2000
MOST_GUIDANCE = 2.0
"""The draft learns to follow the target at guidance scales from 1 up to this."""


def distil_adapter(
    target: CausalModel,
    small: CausalModel,
    chain: Chain,
    data: Digits,
    options: FitOptions,
    checkpoint: Path,
    progress: Progress,
) -> CausalBackbone:
    """A draft of kind `head = "target"`: `small`'s trunk and a linear adapter to the target's z.

    The adapter starts as the least-squares map between the two models' features (most of the way); trunk
    and adapter are then fitted through the frozen target head on the path KL of `chain`.
    """
    draft = CausalBackbone(small.backbone.size, adapter_dim=target.backbone.z_dim)
    draft.load_state_dict(small.backbone.state_dict(), strict=False)
    torch.manual_seed(options.seed)
    _solve_adapter(draft, target, data, context_std=chain.spec.final_std)
    loss = path_divergence_loss(
        draft, target, chain, context_std=chain.spec.final_std, draws=2, most_guidance=MOST_GUIDANCE
    )
    fit(draft, loss, data, options, checkpoint, progress)
    return draft


@torch.no_grad()
def _solve_adapter(draft: CausalBackbone, target: CausalModel, data: Digits, *, context_std: float) -> None:
    chosen = torch.randperm(len(data.train_images))[:LEAST_SQUARES_IMAGES]
    tokens = prepare_tokens(data.train_images[chosen])
    context = tokens + context_std * torch.randn_like(tokens)
    label = data.train_labels[chosen].clone()
    label[::10] = CLASSES  # the dropped label is adapted too
    features = draft.trunk(context, label).flatten(0, 1)
    wanted = target.backbone(context, label).flatten(0, 1)
    with_one = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    solution = torch.linalg.lstsq(with_one, wanted.double()).solution.float()
    assert isinstance(draft.adapter, nn.Linear)
    draft.adapter.weight.copy_(solution[:-1].T)
    draft.adapter.bias.copy_(solution[-1])
