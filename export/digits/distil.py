"""Distils a draft that drives the target's head: a least-squares fit first, then the path's KL divergence."""

from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import Progress
from torch import nn

from export.digits.data import CLASSES, Digits
from export.digits.losses import Task, backbone_of, path_divergence_loss, prepare_tokens
from export.digits.training import FitOptions, fit
from export.models.causal import CausalBackbone, CausalModel
from export.models.mar import Mar, MarBackbone
from specdec_rt.chain import Chain

__all__ = ["distil_adapter"]

LEAST_SQUARES_IMAGES = 2000
LEAST_SQUARES_BATCH = 100
"""Images in a batch; the MAR family draws one number of predicted tokens for all of them."""
DRAWS = 2
"""Transitions at which each token's KL divergence is estimated."""
MOST_GUIDANCE = 2.0
"""The draft learns to follow the target at guidance scales from 1 up to this."""

DraftBackbone = TypeVar("DraftBackbone", CausalBackbone, MarBackbone)


def distil_adapter(
    draft: DraftBackbone,
    small: CausalModel | Mar,
    target: CausalModel | Mar,
    task: Task,
    chain: Chain,
    data: Digits,
    options: FitOptions,
    checkpoint: Path,
    progress: Progress,
) -> DraftBackbone:
    """Fit a draft without a head of its own: `small`'s trunk, and a linear adapter to the target's z.

    The adapter starts as the least-squares map from `small`'s features to the target's z, which brings it most of
    the way. Then trunk and adapter are trained on the KL divergence of `chain`'s paths.
    """
    found = draft.load_state_dict(backbone_of(small).state_dict(), strict=False)
    assert all(name.startswith("adapter.") for name in found.missing_keys)
    torch.manual_seed(options.seed)
    _solve_adapter(draft, target, task, data, context_std=chain.spec.final_std)
    loss = path_divergence_loss(
        draft, target, task, chain, context_std=chain.spec.final_std, draws=DRAWS, most_guidance=MOST_GUIDANCE
    )
    fit(draft, loss, data, options, checkpoint, progress)
    return draft


@torch.no_grad()
def _solve_adapter(
    draft: CausalBackbone | MarBackbone, target: CausalModel | Mar, task: Task, data: Digits, *, context_std: float
) -> None:
    """Set the adapter to the least-squares map from the draft's features to the target's z."""
    chosen = torch.randperm(len(data.train_images))[:LEAST_SQUARES_IMAGES]
    features, wanted = [], []
    for batch in chosen.split(LEAST_SQUARES_BATCH):
        tokens = prepare_tokens(data.train_images[batch])
        split = task.split(len(tokens))
        context = tokens + context_std * torch.randn_like(tokens)
        label = data.train_labels[batch].clone()
        label[::10] = CLASSES  # the dropped label is adapted too
        features.append(task.condition(draft.trunk, context, label, split).flatten(0, 1))
        wanted.append(task.condition(backbone_of(target), context, label, split).flatten(0, 1))
    rows = torch.cat(features)
    with_one = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
    solution = torch.linalg.lstsq(with_one, torch.cat(wanted).double()).solution.float()
    assert isinstance(draft.adapter, nn.Linear)
    draft.adapter.weight.copy_(solution[:-1].T)
    draft.adapter.bias.copy_(solution[-1])
