"""One resumable, seeded training loop, and the losses of the pairs' models."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from export.digits.data import CLASSES, TOKENS, Digits, patchify
from export.models.causal import CausalModel
from export.models.head import DiffusionHead
from export.models.mar import Mar
from specdec_rt.chain import TRAINING_STEPS, Chain, cosine_alpha_bar

__all__ = [
    "FitOptions",
    "Masked",
    "NextToken",
    "Places",
    "Task",
    "backbone_of",
    "denoising_loss",
    "fit",
    "path_divergence_loss",
    "prepare_tokens",
]

LABEL_DROP = 0.1
HELD_OUT_BATCHES = 10
"""Batches of test images, each with places of its own."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How long and how fast one model is trained."""

    epochs: int
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warm_up: int = 200
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0


Loss = Callable[[Tensor, Tensor], Tensor]
"""`(images uint8 [B, 28, 28], label [B])` to a scalar; draws its own noise from torch's global generator."""


@dataclass(frozen=True)
class Places:
    """Which tokens of each image a batch predicts, and from which."""

    predicted: Tensor
    """`[B, Q]` indices"""
    visible: Tensor
    """`[B, K]` indices of what all of them see, besides what the model's own order shows to each"""

    def pick(self, tokens: Tensor) -> Tensor:
        """`tokens [B, L, D]` to the predicted ones, `[B, Q, D]`."""
        return tokens.gather(1, self.predicted[..., None].expand(-1, -1, tokens.shape[2]))

    def twice(self) -> "Places":
        """For the batch followed by itself."""
        return Places(self.predicted.repeat(2, 1), self.visible.repeat(2, 1))


class Task(Protocol):
    """How a family is trained: what it predicts from what."""

    def places(self, batch: int) -> Places:
        """For `batch` images; drawn from torch's global generator where there is a choice."""

    def condition(self, backbone: Callable[..., Tensor], context: Tensor, label: Tensor, places: Places) -> Tensor:
        """`context [B, L, D]` and `label [B]` to `backbone`'s (or its trunk's) `[B, Q, Z]` at the predicted places."""


@dataclass(frozen=True)
class NextToken:
    """Causal models: every token is predicted from those before it."""

    def places(self, batch: int) -> Places:
        return Places(torch.arange(TOKENS).expand(batch, -1), torch.empty(batch, 0, dtype=torch.long))

    def condition(self, backbone: Callable[..., Tensor], context: Tensor, label: Tensor, places: Places) -> Tensor:  # noqa: ARG002
        return backbone(context, label)


@dataclass(frozen=True)
class Masked:
    """MAR: the end of a random order is visible, the rest is predicted, each token by itself.

    How many are predicted is one number a batch, spread as the steps of generation meet it
    (MaskGIT's cosine schedule).
    """

    def places(self, batch: int) -> Places:
        count = math.ceil(TOKENS * math.cos(math.pi / 2 * torch.rand(()).item()))  # 1 … L: the draw is below 1
        order = torch.rand(batch, TOKENS).argsort(dim=1)
        return Places(order[:, :count], order[:, count:])

    def condition(self, backbone: Callable[..., Tensor], context: Tensor, label: Tensor, places: Places) -> Tensor:
        visible = places.visible
        return backbone(context, visible, torch.ones_like(visible, dtype=torch.bool), label, places.predicted)


def backbone_of(model: CausalModel | Mar) -> nn.Module:
    """What gives `model`'s z: a MAR is its own backbone."""
    return model.backbone if isinstance(model, CausalModel) else model


def shifted(images: Tensor) -> Tensor:
    """The batch moved by up to one pixel each way: nine times the data (a digit's margin is wider)."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), dims=(1, 2))


def prepare_tokens(images: Tensor) -> Tensor:
    """uint8 `[B, 28, 28]` to dequantised tokens `[B, 49, 16]` in [-1, 1]."""
    noisy = (images.float() + torch.rand(images.shape)) / 256
    return patchify(noisy * 2 - 1)


def drop_labels(label: Tensor) -> Tensor:
    """Replace a share of the labels by the dropped label, so that guidance has a model to lean on."""
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
    """Mean squared error of ε̂ at `draws` random steps of each token, the context noised as the chain does."""

    def loss(images: Tensor, label: Tensor) -> Tensor:
        tokens = prepare_tokens(images)
        places = task.places(len(tokens))
        context = tokens + context_std * torch.randn_like(tokens)
        z = task.condition(backbone_of(model), context, drop_labels(label), places)
        timestep = torch.randint(TRAINING_STEPS, (*places.predicted.shape, draws))
        state, noise = noised(places.pick(tokens), timestep)
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
    """KL divergence of the chain's path under the draft from the target's, through the frozen target head.

    A sum over the chain's transitions of b²/(2σ²)‖ε̂_q - ε̂_p‖², estimated at steps drawn half by that
    weight and half uniformly, then reweighted. Returned per token. Predictions are guided, each image's
    at a scale of its own between 1 and `most_guidance`: what decoding compares are guided paths.
    """
    weight = torch.from_numpy(chain.epsilon_weight)
    probability = 0.5 * weight / weight.sum() + 0.5 / len(weight)
    importance = (weight / probability).float()
    steps = torch.from_numpy(chain.timestep)
    target.requires_grad_(False)

    def loss(images: Tensor, label: Tensor) -> Tensor:
        tokens = prepare_tokens(images)
        places = task.places(len(tokens))
        context = (tokens + context_std * torch.randn_like(tokens)).repeat(2, 1, 1)
        branches = torch.cat([label, torch.full_like(label, CLASSES)])
        scale = 1 + (most_guidance - 1) * torch.rand(len(label), 1, 1, 1)
        row = torch.multinomial(probability, places.predicted.numel() * draws, replacement=True)
        row = row.view(*places.predicted.shape, draws)
        state, _ = noised(places.pick(tokens), steps[row])

        def guided(backbone: nn.Module) -> Tensor:
            z = task.condition(backbone, context, branches, places.twice())
            both = predict(target.head, state.repeat(2, 1, 1, 1), steps[row].repeat(2, 1, 1), z)
            conditional, unconditional = both.chunk(2)
            return scale * conditional + (1 - scale) * unconditional

        with torch.no_grad():
            wanted = guided(backbone_of(target))
        return (importance[row] * (guided(draft) - wanted).square().sum(-1)).mean()

    return loss


@torch.no_grad()
def held_out(loss: Loss, data: Digits) -> float:
    """The loss on the test images, on the same draws every time."""
    batches = [slice(first, None, HELD_OUT_BATCHES) for first in range(HELD_OUT_BATCHES)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = [loss(data.test_images[batch], data.test_labels[batch]).item() for batch in batches]
    return sum(values) / len(values)


def fit(
    module: nn.Module, loss: Loss, data: Digits, options: FitOptions, checkpoint: Path, progress: Progress
) -> nn.Module:
    """Train `module`'s trainable parameters on `loss`; return it holding its moving average, in eval mode.

    Resumes from `checkpoint` where that exists, and rewrites it (atomically) after every epoch.
    """
    torch.manual_seed(options.seed)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in parameters.items()}
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    per_epoch = len(data.train_images) // options.batch
    total = options.epochs * per_epoch
    step = 0
    history: list[tuple[float, float]] = []
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        found = stored.get("options")
        if found != asdict(options):
            raise SystemExit(f"{checkpoint} was trained with other options, {found}: delete it to train anew")
        for name, parameter in parameters.items():
            parameter.data.copy_(stored["model"][name])
        average, step, history = stored["average"], stored["step"], stored["history"]
        optimiser.load_state_dict(stored["optimiser"])
        torch.set_rng_state(stored["rng"])
    task = progress.add_task(checkpoint.stem, total=total, completed=step)
    while step < total:
        running = 0.0
        for batch in torch.randperm(len(data.train_images))[: per_epoch * options.batch].split(options.batch):
            scale = min((step + 1) / options.warm_up, 0.5 * (1 + math.cos(math.pi * step / total)))
            for group in optimiser.param_groups:
                group["lr"] = options.learning_rate * scale
            value = loss(shifted(data.train_images[batch]), data.train_labels[batch])
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters.values(), options.clip)
            optimiser.step()
            decay = min(options.ema, (step + 1) / (step + 10))
            for name, parameter in parameters.items():
                average[name].lerp_(parameter.detach(), 1 - decay)
            step += 1
            running += value.item()
            progress.update(task, completed=step)
        history.append((running / per_epoch, held_out(loss, data)))
        train, test = history[-1]
        progress.console.log(
            f"{checkpoint.stem}: epoch {step // per_epoch} of {options.epochs}, loss {train:.4f}, held out {test:.4f}"
        )
        state = {
            "options": asdict(options),
            "model": {name: p.detach() for name, p in parameters.items()},
            "average": average,
            "optimiser": optimiser.state_dict(),
            "step": step,
            "history": history,
            "rng": torch.get_rng_state(),
        }
        part = checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.rename(checkpoint)
    for name, parameter in parameters.items():
        parameter.data.copy_(average[name])
    return module.eval()
