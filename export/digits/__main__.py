"""Train, distil, export and evaluate a digits pair: `python -m export.digits [--family mar] --out DIR`.

Seeded; each stage resumes from its checkpoint under --work. On two cores the whole takes about 75 minutes.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundles import annotate, replace_bundle, require_replaceable
from export.causal import CausalPair, read_pair, write_bundle
from export.digits.causal_pair import train_causal_pair
from export.digits.classifier import export_classifier, train_classifier
from export.digits.data import Digits, load_digits
from export.digits.evaluate import evaluate_bundle
from export.digits.mar_pair import train_mar_pair
from export.digits.training import FitOptions
from export.mar_models import MarPair, read_mar_pair, write_mar_bundle
from export.precision import compute_precisions
from specdec_rt.bundle import load_bundle
from specdec_rt.errors import OutputError
from specdec_rt.manifest import Precision

WORK = {"causal": Path("work/digits"), "mar": Path("work/digits-mar")}
"""Where each family's checkpoints are kept."""
CLASSIFIER_FIT = FitOptions(epochs=12, learning_rate=2e-3, seed=3)


def install(folder: Path, out: Path) -> None:
    """Copy a finished bundle to `out`, in the place of the one that is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        replace_bundle(shutil.copytree(folder, Path(scratch, out.name)), out)


def read(folder: Path) -> CausalPair | MarPair:
    """The pair of a bundle that holds digits of either family."""
    return read_mar_pair(folder) if load_bundle(folder).manifest.family == "mar" else read_pair(folder)


def train(family: str, data: Digits, work: Path, progress: Progress) -> CausalPair | MarPair:
    """Train the family's pair."""
    return train_mar_pair(data, work, progress) if family == "mar" else train_causal_pair(data, work, progress)


def write(pair: CausalPair | MarPair, out: Path, compute: Sequence[Precision]) -> None:
    """Export the pair, its weights in half precision."""
    if isinstance(pair, MarPair):
        write_mar_bundle(pair, out, precision="fp16", compute=compute)
    else:
        write_bundle(pair, out, precision="fp16", compute=compute)


def main() -> None:
    """Run every stage that is not done yet."""
    parser = argparse.ArgumentParser(prog="python -m export.digits", description=__doc__)
    parser.add_argument("--family", choices=WORK, help="which pair to train (default: causal)")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder, replaced as a whole")
    parser.add_argument(
        "--from-bundle", type=Path, help="take weights and family from this bundle: export and evaluate only"
    )
    parser.add_argument(
        "--compute",
        type=compute_precisions,
        default="fp32,fp16,bf16",
        metavar="LIST",
        help="in which graphs can compute; fp32 always is among them (default: %(default)s)",
    )
    parser.add_argument("--work", type=Path, help="checkpoints, kept to resume from (default: work/digits[-mar])")
    parser.add_argument("--data", type=Path, default=Path(".data"), help="where the data set is kept")
    parser.add_argument("--classifier", type=Path, help="also write the classifier that judges, as ONNX")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.from_bundle and arguments.family:
        parser.error("--from-bundle takes the family from the bundle; leave out --family")
    family = arguments.family or "causal"
    arguments.out = arguments.out.resolve()
    try:
        require_replaceable(arguments.out)
    except OutputError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    work = arguments.work or WORK[family]
    work.mkdir(parents=True, exist_ok=True)
    data = load_digits(arguments.data)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        source = arguments.from_bundle
        pair = read(source) if source else train(family, data, work, progress)
        classifier = train_classifier(data, CLASSIFIER_FIT, work / "classifier.pt", progress)
        if arguments.classifier:
            export_classifier(classifier, arguments.classifier)
        finished = work / "bundle"
        write(pair, finished, arguments.compute)
        figures = evaluate_bundle(finished, classifier, data, progress)
    annotate(finished, {"figures": figures})
    install(finished, arguments.out)
    Console().print_json(json.dumps(figures))


if __name__ == "__main__":
    main()
