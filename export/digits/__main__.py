"""Train, distil, evaluate and export the digits pair: `python -m export.digits --out DIR`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.digits.data import CLASSES, TOKEN_DIM, TOKENS, load_digits
from export.digits.training import FitOptions, denoising_loss, fit
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from specdec_rt.schedule import ChainSpec

CHAIN = ChainSpec(steps=25, t_max=975, drop_last=2, final_std=0.1, variance="large", emit="mean")

TARGET_FIT = FitOptions(epochs=36)
SMALL_FIT = FitOptions(epochs=20, learning_rate=1.5e-3, seed=1)


def causal_model(*, width: int, depth: int, heads: int, head_width: int, head_depth: int) -> CausalModel:
    size = CausalBackboneSize(
        tokens=TOKENS, token_dim=TOKEN_DIM, classes=CLASSES, width=width, depth=depth, heads=heads
    )
    head = DiffusionHead(TOKEN_DIM, width, head_width, head_depth, learned_variance=False)
    return CausalModel(CausalBackbone(size), head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work/digits"), help="checkpoints, kept to resume from")
    parser.add_argument("--data", type=Path, default=Path(".data"), help="where the data set is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = load_digits(arguments.data)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        torch.manual_seed(0)
        target = causal_model(width=192, depth=6, heads=6, head_width=256, head_depth=3)
        fit(
            target,
            denoising_loss(target, context_std=CHAIN.final_std, draws=2),
            data,
            TARGET_FIT,
            arguments.work / "target.pt",
            progress,
        )
        torch.manual_seed(1)
        small = causal_model(width=96, depth=2, heads=4, head_width=128, head_depth=2)
        fit(
            small,
            denoising_loss(small, context_std=CHAIN.final_std, draws=2),
            data,
            SMALL_FIT,
            arguments.work / "small.pt",
            progress,
        )


if __name__ == "__main__":
    main()
