"""A seeded training loop that can be resumed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from export.digits.data import Digits
from export.digits.losses import Loss

__all__ = ["FitOptions", "fit"]

HELD_OUT_BATCHES = 10
"""Batches of test images, each with its own choice of predicted tokens."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How one model is trained."""

    epochs: int
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warm_up: int = 200
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0


def shifted(images: Tensor) -> Tensor:
    """The batch moved by up to one pixel in each direction, for nine times the data; digits have wider margins."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), dims=(1, 2))


@torch.no_grad()
def held_out(loss: Loss, data: Digits) -> float:
    """The loss on the test images, with the same random draws every time."""
    batches = [slice(first, None, HELD_OUT_BATCHES) for first in range(HELD_OUT_BATCHES)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = [loss(data.test_images[batch], data.test_labels[batch]).item() for batch in batches]
    return sum(values) / len(values)


def fit(
    module: nn.Module, loss: Loss, data: Digits, options: FitOptions, checkpoint: Path, progress: Progress
) -> nn.Module:
    """Train `module` on `loss` and return it in eval mode, with the moving average of its parameters.

    Parameters that need no gradient stay as they are. Training resumes from `checkpoint` where that exists;
    `checkpoint` is replaced after every epoch, in one step. Raises SystemExit where it was trained with other
    options.
    """
    torch.manual_seed(options.seed)
    training = _Training(module, loss, data, options)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state.get("options") != asdict(options):
            raise SystemExit(
                f"{checkpoint} was trained with other options, {state.get('options')}: delete it to train anew"
            )
        training.restore(state)
    task = progress.add_task(checkpoint.stem, total=training.total, completed=training.step)
    while training.step < training.total:
        train = training.run_epoch(lambda step: progress.update(task, completed=step))
        test = held_out(loss, data)
        training.history.append((train, test))
        epoch = training.step // training.per_epoch
        progress.console.log(
            f"{checkpoint.stem}: epoch {epoch} of {options.epochs}, loss {train:.4f}, held out {test:.4f}"
        )
        part = checkpoint.with_suffix(".part")
        torch.save(training.state(), part)
        part.rename(checkpoint)
    training.take_average()
    return module.eval()


class _Training:
    """A model in training: its optimiser, the moving average of its parameters, and the steps done so far."""

    def __init__(self, module: nn.Module, loss: Loss, data: Digits, options: FitOptions) -> None:
        self._loss, self._data, self._options = loss, data, options
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._optimiser = torch.optim.AdamW(
            self._parameters.values(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        self.per_epoch = len(data.train_images) // options.batch
        self.total = options.epochs * self.per_epoch
        self.step = 0
        self.history: list[tuple[float, float]] = []
        """the mean training loss and the held-out loss of each epoch"""

    def run_epoch(self, progress: Callable[[int], None]) -> float:
        """Train on every image once, in random order; returns the mean loss. `progress` gets the steps done."""
        size, running = self._options.batch, 0.0
        for batch in torch.randperm(len(self._data.train_images))[: self.per_epoch * size].split(size):
            running += self._take_step(batch)
            progress(self.step)
        return running / self.per_epoch

    def _take_step(self, batch: Tensor) -> float:
        """One step on the images `batch [B]`; returns its loss."""
        options = self._options
        scale = min((self.step + 1) / options.warm_up, 0.5 * (1 + math.cos(math.pi * self.step / self.total)))
        for group in self._optimiser.param_groups:
            group["lr"] = options.learning_rate * scale
        value = self._loss(shifted(self._data.train_images[batch]), self._data.train_labels[batch])
        self._optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), options.clip)
        self._optimiser.step()
        decay = min(options.ema, (self.step + 1) / (self.step + 10))
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.detach(), 1 - decay)
        self.step += 1
        return value.item()

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on from here."""
        return {
            "options": asdict(self._options),
            "model": {name: p.detach() for name, p in self._parameters.items()},
            "average": self._average,
            "optimiser": self._optimiser.state_dict(),
            "step": self.step,
            "history": self.history,
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state["model"][name])
        self._average, self.step, self.history = state["average"], state["step"], state["history"]
        self._optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])

    def take_average(self) -> None:
        """Give the module the moving average of its parameters."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._average[name])
