"""What each family of digits models learns to predict, and the losses that train targets and drafts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.digits.data import CLASSES, TOKENS, patchify
from export.models.causal import CausalModel
from export.models.head import DiffusionHead
from export.models.mar import Mar
from specdec_rt.chain import TRAINING_STEPS, Chain, cosine_alpha_bar

__all__ = [
    "Loss",
    "Masked",
    "NextToken",
    "Split",
    "Task",
    "backbone_of",
    "denoising_loss",
    "path_divergence_loss",
    "prepare_tokens",
]

LABEL_DROP = 0.1
"""Share of labels that are dropped in training."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(images uint8 [B, 28, 28], label [B])` to a scalar; draws its own noise from torch's global generator."""


@dataclass(frozen=True)
class Split:
    """Which tokens of each image a batch predicts, and from which."""

    predicted: Tensor
    """`[B, Q]`: positions"""
    visible: Tensor
    """`[B, K]`: positions of the tokens that all predictions see; none where the model's order decides that"""

    def pick(self, tokens: Tensor) -> Tensor:
        """The predicted ones, `[B, Q, D]`, of `tokens [B, L, D]`."""
        return tokens.gather(1, self.predicted[..., None].expand(-1, -1, tokens.shape[2]))

    def twice(self) -> "Split":
        """The split of a batch that is followed by itself."""
        return Split(self.predicted.repeat(2, 1), self.visible.repeat(2, 1))


class Task(Protocol):
    """What a family is trained to predict, and from what."""

    def split(self, batch: int) -> Split:
        """A split of the tokens of `batch` images; drawn from torch's global generator where there is a choice."""

    def condition(self, backbone: Callable[..., Tensor], context: Tensor, label: Tensor, split: Split) -> Tensor:
        """What `backbone` (or its trunk) gives at the predicted tokens, `[B, Q, Z]`.

        `context [B, L, D]` are the tokens that it sees, `label [B]` the labels.
        """


@dataclass(frozen=True)
class NextToken:
    """Causal models: every token is predicted from those before it."""

    def split(self, batch: int) -> Split:
        """Predict all; visible is what the causal mask shows."""
        return Split(torch.arange(TOKENS).expand(batch, -1), torch.empty(batch, 0, dtype=torch.long))

    def condition(self, backbone: Callable[..., Tensor], context: Tensor, label: Tensor, split: Split) -> Tensor:  # noqa: ARG002
        """Of all tokens."""
        return backbone(context, label)


@dataclass(frozen=True)
class Masked:
    """MAR: each image's tokens are put in a random order; the first ones are predicted from the others.

    How many is one number for a batch, distributed as it is over the AR steps of generation (MaskGIT's cosine
    schedule).
    """

    def split(self, batch: int) -> Split:
        """Draw the number to predict, then each image's order."""
        count = math.ceil(TOKENS * math.cos(math.pi / 2 * torch.rand(()).item()))  # 1 … L: the draw is below 1
        order = torch.rand(batch, TOKENS).argsort(dim=1)
        return Split(order[:, :count], order[:, count:])

    def condition(self, backbone: Callable[..., Tensor], context: Tensor, label: Tensor, split: Split) -> Tensor:
        """Of the predicted tokens alone."""
        visible = split.visible
        return backbone(context, visible, torch.ones_like(visible, dtype=torch.bool), label, split.predicted)


def backbone_of(model: CausalModel | Mar) -> nn.Module:
    """The module that computes `model`'s z; a Mar is its own backbone."""
    return model.backbone if isinstance(model, CausalModel) else model


def prepare_tokens(images: Tensor) -> Tensor:
    """uint8 `[B, 28, 28]` to dequantised tokens `[B, 49, 16]` in [-1, 1]."""
    noisy = (images.float() + torch.rand(images.shape)) / 256
    return patchify(noisy * 2 - 1)


def drop_labels(label: Tensor) -> Tensor:
    """Replace a share of the labels by the dropped label: guidance needs predictions without a label."""
    return torch.where(torch.rand(label.shape) < LABEL_DROP, CLASSES, label)


def noised(tokens: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """`tokens [..., D]` at `timestep [..., K]` to `(state, noise)`, each `[..., K, D]`."""
    signal = torch.from_numpy(cosine_alpha_bar()).float()[timestep][..., None]
    noise = torch.randn(*timestep.shape, tokens.shape[-1])
    return signal.sqrt() * tokens[..., None, :] + (1 - signal).sqrt() * noise, noise


def predict(head: DiffusionHead, state: Tensor, timestep: Tensor, z: Tensor) -> Tensor:
    """`state [B, Q, K, D]`, `timestep [B, Q, K]`, `z [B, Q, Z]` to ε̂ `[B, Q, K, D]`."""
    time_rows = head.time_embed(torch.arange(TRAINING_STEPS))
    return head(state, time_rows[timestep] + head.cond_embed(z)[..., None, :])


def denoising_loss(model: CausalModel | Mar, task: Task, *, context_std: float, draws: int) -> Loss:
    """Mean squared error of ε̂ at `draws` random training steps of each token.

    Context tokens get noise of `context_std`, as the tokens that the chain feeds back have it.
    """

    def loss(images: Tensor, label: Tensor) -> Tensor:
        tokens = prepare_tokens(images)
        split = task.split(len(tokens))
        context = tokens + context_std * torch.randn_like(tokens)
        z = task.condition(backbone_of(model), context, drop_labels(label), split)
        timestep = torch.randint(TRAINING_STEPS, (*split.predicted.shape, draws))
        state, noise = noised(split.pick(tokens), timestep)
        return F.mse_loss(predict(model.head, state, timestep, z), noise)

    return loss


def path_divergence_loss(
    draft: nn.Module,
    target: CausalModel | Mar,
    task: Task,
    chain: Chain,
    *,
    context_std: float,
    draws: int,
    most_guidance: float,
) -> Loss:
    """KL divergence between the draft's and the target's chain, per token; both go through the frozen target head.

    It is the sum over transitions of b²/(2σ²)‖ε̂_q - ε̂_p‖², estimated at `draws` transitions of each token: they
    are drawn half by that weight and half uniformly, then reweighted. As decoding compares guided predictions,
    predictions here are guided, too, for each image at a random scale between 1 and `most_guidance`.
    """
    weight = torch.from_numpy(chain.epsilon_weight)
    probability = 0.5 * weight / weight.sum() + 0.5 / len(weight)
    importance = (weight / probability).float()
    steps = torch.from_numpy(chain.timestep)
    target.requires_grad_(False)

    def loss(images: Tensor, label: Tensor) -> Tensor:
        tokens = prepare_tokens(images)
        split = task.split(len(tokens))
        context = (tokens + context_std * torch.randn_like(tokens)).repeat(2, 1, 1)
        branches = torch.cat([label, torch.full_like(label, CLASSES)])
        scale = 1 + (most_guidance - 1) * torch.rand(len(label), 1, 1, 1)
        row = torch.multinomial(probability, split.predicted.numel() * draws, replacement=True)
        row = row.view(*split.predicted.shape, draws)
        state, _ = noised(split.pick(tokens), steps[row])

        def guided(backbone: nn.Module) -> Tensor:
            z = task.condition(backbone, context, branches, split.twice())
            both = predict(target.head, state.repeat(2, 1, 1, 1), steps[row].repeat(2, 1, 1), z)
            conditional, unconditional = both.chunk(2)
            return scale * conditional + (1 - scale) * unconditional

        with torch.no_grad():
            wanted = guided(backbone_of(target))
        return (importance[row] * (guided(draft) - wanted).square().sum(-1)).mean()

    return loss
