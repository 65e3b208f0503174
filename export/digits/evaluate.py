"""Figures of a finished bundle, measured on its own engines through the runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from export.digits.classifier import DigitClassifier
from export.digits.data import CLASSES, Digits
from export.digits.next_token import energy_distance, next_token_distances
from specdec_rt import Result, load
from specdec_rt.types import Array, IntArray

__all__ = ["evaluate_bundle"]

TARGET_IMAGES_PER_CLASS = 100
SPECULATED_IMAGES_PER_CLASS = 20
COMPARED_IMAGES_PER_CLASS = 30
TAUS = (1, 4, 16, 42)
FEWER_STEPS = (0.75, 0.5, 0.33, 0.25, 0.16)
"""Shares of a MAR bundle's tokens that its target is tried with as AR steps."""

Generate = Callable[..., Result]


@dataclass(frozen=True)
class Judge:
    """What the classifier of real digits says of images `[N, 28, 28, 1]` uint8 and their labels."""

    classifier: DigitClassifier

    @torch.no_grad()
    def _of(self, images: Array) -> tuple[Tensor, Tensor]:
        logits, features = self.classifier(torch.from_numpy(images[..., 0]).float() / 255)
        return logits, features.double()

    def accuracy(self, images: Array, labels: IntArray) -> float:
        """Share of the images that it names as their labels."""
        return float((self._of(images)[0].argmax(-1).numpy() == labels).mean())

    def distance(self, first: Array, second: Array, labels_first: IntArray, labels_second: IntArray) -> float:
        """Energy distance of the features within a class, averaged over classes; about 0 for one distribution."""
        a, b = self._of(first)[1], self._of(second)[1]
        classes = np.unique(labels_first)
        return float(np.mean([energy_distance(a[labels_first == c], b[labels_second == c]) for c in classes]))


def spread(images: Tensor, labels: Tensor) -> float:
    """Mean distance between two images of one class, in grey levels per pixel (root mean square)."""
    distances = []
    for label in range(CLASSES):
        members = images[labels == label].flatten(1).float()
        distances.append((torch.pdist(members) / members.shape[1] ** 0.5).mean().item())
    return float(np.mean(distances))


def evaluate_bundle(folder: Path, classifier: DigitClassifier, data: Digits, progress: Progress) -> dict[str, Any]:
    """Classifier accuracy and spread in `target` mode, acceptance and calls in the other modes.

    Of a MAR bundle also what `paper` mode's τ does, and what taking fewer AR steps does.
    """
    pipeline = load(folder)
    manifest, judge = pipeline.bundle.manifest, Judge(classifier)

    def generate(name: str, per_class: int, *, seed: int = 0, **options: Any) -> Result:
        task = progress.add_task(name)
        labels = np.repeat(np.arange(CLASSES), per_class)
        return pipeline.generate(
            labels,
            seed=seed,
            batch_size=50,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            **options,
        )

    drawn = generate("target mode", TARGET_IMAGES_PER_CLASS, mode="target")
    assert drawn.images is not None
    figures: dict[str, Any] = {
        "classifier_accuracy": {
            "real_test_images": judge.accuracy(data.test_images[..., None].numpy(), data.test_labels.numpy()),
            f"target_mode_{len(drawn.labels)}_images": judge.accuracy(drawn.images, drawn.labels),
        },
        "spread_within_class": {
            "real_test_images": spread(data.test_images, data.test_labels),
            "target_mode": spread(torch.from_numpy(drawn.images[..., 0]), torch.from_numpy(drawn.labels)),
        },
        "speculation": {},
    }
    for draft in (*manifest.drafts, "self"):
        result = generate(f"exact, draft {draft}", SPECULATED_IMAGES_PER_CLASS, mode="exact", draft=draft)
        figures["speculation"][draft] = _speculation(result, manifest.tokens)
    if manifest.family == "mar":
        again = generate("target mode again", COMPARED_IMAGES_PER_CLASS, seed=1, mode="target")
        figures["target_mode_again"] = _compared(judge, again, drawn, manifest.tokens)
        figures["paper"] = _paper(generate, judge, drawn, manifest.tokens)
        figures["next_token"] = {draft: next_token_distances(pipeline, draft, TAUS) for draft in manifest.drafts}
        figures["fewer_steps"] = _fewer_steps(generate, judge, drawn, manifest.tokens)
    return figures


def _paper(generate: Generate, judge: Judge, drawn: Result, tokens: int) -> dict[str, Any]:
    """What mode `paper` accepts at each τ, and how far its images are from the target's."""
    figures: dict[str, Any] = {}
    for tau in TAUS:
        result = generate(f"paper, tau {tau}", COMPARED_IMAGES_PER_CLASS, seed=2, mode="paper", tau=tau)
        figures[f"tau_{tau}"] = _compared(judge, result, drawn, tokens)
    for mode in ("exact", "draft"):
        result = generate(f"{mode} mode", COMPARED_IMAGES_PER_CLASS, seed=3, mode=mode)
        figures[mode] = _compared(judge, result, drawn, tokens)
    return figures


def _fewer_steps(generate: Generate, judge: Judge, drawn: Result, tokens: int) -> dict[str, Any]:
    """What the target alone draws in fewer AR steps, each of which makes a set of tokens at once."""
    figures: dict[str, Any] = {}
    for steps in (tokens, *(round(share * tokens) for share in FEWER_STEPS)):
        result = generate(f"{steps} steps", COMPARED_IMAGES_PER_CLASS, seed=4, mode="target", ar_steps=steps)
        figures[f"target_{steps}_steps"] = _compared(judge, result, drawn, tokens)
    return figures


def _compared(judge: Judge, result: Result, drawn: Result, tokens: int) -> dict[str, float | None]:
    assert result.images is not None
    assert drawn.images is not None
    return {
        **_speculation(result, tokens),
        "classifier_accuracy": judge.accuracy(result.images, result.labels),
        "distance_to_target_mode": judge.distance(result.images, drawn.images, result.labels, drawn.labels),
    }


def _speculation(result: Result, tokens: int) -> dict[str, float | None]:
    stats = result.stats
    made = stats.images * tokens
    return {
        "acceptance_rate": stats.acceptance_rate,
        "tokens_per_round": stats.tokens_per_round,
        "target_backbone_calls_per_token": stats.target_backbone_calls / made,
        "sequential_head_calls_per_token": stats.sequential_head_calls / made,
        "images_per_second": stats.images_per_second,
    }
