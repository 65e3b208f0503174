"""Figures of a finished bundle, measured by generating images from it."""

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
"""Numbers of AR steps in which a MAR bundle's target is tried, as shares of the number of tokens."""

Generate = Callable[..., Result]


@dataclass(frozen=True)
class Judge:
    """Judges images `[N, 28, 28, 1]` uint8 by the classifier of real digits."""

    classifier: DigitClassifier

    @torch.no_grad()
    def _classify(self, images: Array) -> tuple[Tensor, Tensor]:
        """Logits `[N, 10]` and features `[N, 32]`."""
        logits, features = self.classifier(torch.from_numpy(images[..., 0]).float() / 255)
        return logits, features.double()

    def accuracy(self, images: Array, labels: IntArray) -> float:
        """Share of the images that the classifier recognises as their labels."""
        return float((self._classify(images)[0].argmax(-1).numpy() == labels).mean())

    def distance(self, first: Array, second: Array, labels_first: IntArray, labels_second: IntArray) -> float:
        """Energy distance of features within a class, averaged over classes; about 0 for equal distributions."""
        a, b = self._classify(first)[1], self._classify(second)[1]
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
    """Accuracy and spread of images in mode `target`, acceptance and calls in mode `exact` with each draft.

    For a MAR bundle also the effect of τ in mode `paper`, and of fewer AR steps.
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
        figures["next_token"] = {}
        for draft in manifest.drafts:
            task = progress.add_task(f"next token, draft {draft}", total=None)
            figures["next_token"][draft] = next_token_distances(pipeline, draft, TAUS)
            progress.update(task, total=1, completed=1)
        figures["fewer_steps"] = _fewer_steps(generate, judge, drawn, manifest.tokens)
    return figures


def _paper(generate: Generate, judge: Judge, drawn: Result, tokens: int) -> dict[str, Any]:
    """Acceptance in mode `paper` at each τ, and how far its images are from those of mode `target`."""
    figures: dict[str, Any] = {}
    for tau in TAUS:
        result = generate(f"paper, tau {tau}", COMPARED_IMAGES_PER_CLASS, seed=2, mode="paper", tau=tau)
        figures[f"tau_{tau}"] = _compared(judge, result, drawn, tokens)
    for mode in ("exact", "draft"):
        result = generate(f"{mode} mode", COMPARED_IMAGES_PER_CLASS, seed=3, mode=mode)
        figures[mode] = _compared(judge, result, drawn, tokens)
    return figures


def _fewer_steps(generate: Generate, judge: Judge, drawn: Result, tokens: int) -> dict[str, Any]:
    """How far images are from those of mode `target` when each AR step of the target makes a larger set of tokens."""
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
    count = stats.images * tokens
    return {
        "acceptance_rate": stats.acceptance_rate,
        "tokens_per_round": stats.tokens_per_round,
        "target_backbone_calls_per_token": stats.target_backbone_calls / count,
        "sequential_head_calls_per_token": stats.sequential_head_calls / count,
        "images_per_second": stats.images_per_second,
    }
