"""Figures of a finished bundle, measured on its own engines through the runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from export.digits.classifier import DigitClassifier
from export.digits.data import CLASSES, Digits
from specdec_rt import Result, load

__all__ = ["evaluate_bundle"]

TARGET_IMAGES_PER_CLASS = 100
SPECULATED_IMAGES_PER_CLASS = 20


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of uint8 `images [N, 28, 28]` that the classifier names as `labels [N]`."""
    logits, _ = classifier(images.float() / 255)
    return (logits.argmax(-1) == labels).float().mean().item()


def spread(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean distance between two images of one class, in grey levels per pixel (root mean square)."""
    distances = []
    for label in range(CLASSES):
        members = images[labels == label].flatten(1).float()
        pairs = torch.pdist(members) / members.shape[1] ** 0.5
        distances.append(pairs.mean().item())
    return float(np.mean(distances))


def evaluate_bundle(folder: Path, classifier: DigitClassifier, data: Digits, progress: Progress) -> dict[str, Any]:
    """Classifier accuracy and spread in `target` mode, acceptance and calls in the other modes."""
    pipeline = load(folder)
    tokens = pipeline.bundle.manifest.tokens

    def generate(name: str, per_class: int, **options: Any) -> Result:
        task = progress.add_task(name)
        labels = np.repeat(np.arange(CLASSES), per_class)
        return pipeline.generate(
            labels,
            seed=0,
            batch_size=50,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            **options,
        )

    drawn = generate("target mode", TARGET_IMAGES_PER_CLASS, mode="target")
    images, labels = torch.from_numpy(drawn.images[..., 0]), torch.from_numpy(drawn.labels)
    figures: dict[str, Any] = {
        "classifier_accuracy": {
            "real_test_images": accuracy(classifier, data.test_images, data.test_labels),
            f"target_mode_{len(images)}_images": accuracy(classifier, images, labels),
        },
        "spread_within_class": {
            "real_test_images": spread(data.test_images, data.test_labels),
            "target_mode": spread(images, labels),
        },
        "speculation": {},
    }
    for draft in (*pipeline.bundle.manifest.drafts, "self"):
        result = generate(f"exact, draft {draft}", SPECULATED_IMAGES_PER_CLASS, mode="exact", draft=draft)
        figures["speculation"][draft] = _speculation(result, tokens)
    return figures


def _speculation(result: Result, tokens: int) -> dict[str, float | None]:
    stats = result.stats
    made = stats.images * tokens
    return {
        "acceptance_rate": stats.acceptance_rate,
        "tokens_per_round": stats.tokens_per_round,
        "target_backbone_calls_per_token": stats.target_backbone_calls / made,
        "sequential_head_calls_per_token": stats.sequential_head_calls / made,
    }
