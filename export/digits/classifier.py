"""A small classifier of real digits. It judges drawn images, and its features serve to compare sets of images."""

from pathlib import Path

import onnx
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from export.digits.data import CLASSES, SIDE, Digits
from export.digits.training import FitOptions, fit
from export.to_onnx import to_model_proto

__all__ = ["FEATURES", "DigitClassifier", "export_classifier", "train_classifier"]

FEATURES = 32


class DigitClassifier(nn.Module):
    """`image [N, 28, 28]` in [0, 1] to `(logits [N, 10], features [N, 32])`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 3 * 3, FEATURES),
        )  # fmt: skip
        self.readout = nn.Linear(FEATURES, CLASSES)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(image[:, None])
        return self.readout(F.relu(features)), features


def train_classifier(data: Digits, options: FitOptions, checkpoint: Path, progress: Progress) -> DigitClassifier:
    """Train the classifier on the real training images."""
    torch.manual_seed(options.seed)
    model = DigitClassifier()

    def loss(images: Tensor, label: Tensor) -> Tensor:
        logits, _ = model(images.float() / 255)
        return F.cross_entropy(logits, label)

    fit(model, loss, data, options, checkpoint, progress)
    return model


def export_classifier(model: DigitClassifier, path: Path) -> None:
    """Write the classifier as ONNX, for tests that compare images without torch."""
    examples = [torch.rand(3, SIDE, SIDE)]
    shapes = [{0: torch.export.Dim.DYNAMIC}]
    onnx.save(to_model_proto(model, examples, ["image"], ["logits", "features"], shapes), path)
