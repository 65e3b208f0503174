"""Train, distil, export and evaluate a digits pair: `python -m export.digits [--family mar] --out DIR`.

Training is seeded, and resumes from checkpoints under --work. On two cores everything takes about 75 minutes. A bundle
of an older release can be exported anew without training: `--from-bundle DIR`.
"""

import argparse
import json
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundles import annotate, replace_bundle, require_replaceable
from export.causal import CausalPair, read_pair, write_bundle
from export.console import print_line
from export.digits.causal_pair import train_causal_pair
from export.digits.classifier import export_classifier, train_classifier
from export.digits.data import load_digits
from export.digits.evaluate import evaluate_bundle
from export.digits.mar_pair import train_mar_pair
from export.digits.training import FitOptions
from export.mar_models import MarPair, read_mar_pair, write_mar_bundle
from export.precision import compute_precisions
from specdec_rt.bundle import load_bundle
from specdec_rt.errors import SpecDecError
from specdec_rt.manifest import Precision

WORK = {"causal": Path("work/digits"), "mar": Path("work/digits-mar")}
"""Default folder of each family's checkpoints."""
CLASSIFIER_FIT = FitOptions(epochs=12, learning_rate=2e-3, seed=3)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage that is not done yet, or export a bundle's models anew; returns the exit code."""
    parser = _parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(argv)
    if arguments.from_bundle and arguments.family:
        parser.error("--from-bundle takes the family from the bundle; leave out --family")
    if arguments.keep_figures and not arguments.from_bundle:
        parser.error("--keep-figures keeps the figures of a bundle; add --from-bundle DIR")
    if arguments.keep_figures and arguments.classifier:
        parser.error("--classifier is trained for an evaluation, which --keep-figures leaves out; give one of the two")
    arguments.out = arguments.out.resolve()
    torch.set_num_threads(arguments.threads)
    try:
        require_replaceable(arguments.out)
        if arguments.keep_figures:
            _export_again(arguments, argv)
        else:
            _make(arguments, argv)
    except SpecDecError as error:
        print_line(f"error: {error}")
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.digits", description=__doc__)
    add = parser.add_argument
    add("--family", choices=WORK, help="which pair to train (default: causal)")
    add("--out", type=Path, required=True, metavar="DIR", help="the bundle's folder; a bundle there is replaced")
    add("--from-bundle", type=Path, metavar="DIR", help="train nothing: export and evaluate the models of this bundle")
    add(
        "--keep-figures",
        action="store_true",
        help="with --from-bundle: do not evaluate, but keep the bundle's figures (after a change of the schema)",
    )
    add(
        "--compute",
        type=compute_precisions,
        default="fp32,fp16,bf16",
        metavar="LIST",
        help="what graphs can compute in, of fp32, fp16 and bf16; fp32 is always written (default: %(default)s)",
    )
    add("--work", type=Path, metavar="DIR", help="folder of checkpoints to resume from (default: work/digits[-mar])")
    add("--data", type=Path, default=Path(".data"), metavar="DIR", help="folder of the data set (default: %(default)s)")
    add("--classifier", type=Path, metavar="FILE", help="also write the classifier that judges images, as ONNX")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of torch (default: %(default)s)")
    return parser


def _make(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train the pair or read it from a bundle; export and evaluate it; print the figures."""
    source, family = arguments.from_bundle, arguments.family or "causal"
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
        precision: Precision = "fp16"
        if source is not None:
            pair, precision = _read(source)
            pair = replace(pair, provenance={**pair.provenance, **_exported_again(argv, "measured again")})
        elif family == "mar":
            pair = train_mar_pair(data, work, progress)
        else:
            pair = train_causal_pair(data, work, progress)
        classifier = train_classifier(data, CLASSIFIER_FIT, work / "classifier.pt", progress)
        if arguments.classifier:
            export_classifier(classifier, arguments.classifier)
        finished = work / "bundle"
        _write(pair, finished, precision, arguments.compute)
        figures = evaluate_bundle(finished, classifier, data, progress)
    annotate(finished, {"figures": figures})
    _install(finished, arguments.out)
    Console().print_json(json.dumps(figures))


def _export_again(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Export the models of a bundle; its provenance and its figures stay, and say that they are older."""
    pair, precision = _read(arguments.from_bundle)
    notes = _exported_again(argv, "kept: measured on an earlier export of the same weights")
    _write(replace(pair, provenance={**pair.provenance, **notes}), arguments.out, precision, arguments.compute)


def _exported_again(argv: Sequence[str], figures: str) -> dict[str, Any]:
    """The provenance of an export from a bundle, beside that of its weights; `figures` says where figures are from."""
    return {
        "exported_again": {
            "command": shlex.join(["python", "-m", "export.digits", *argv]),
            "figures": figures,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "onnx": onnx.__version__},
        }
    }


def _read(folder: Path) -> tuple[CausalPair | MarPair, Precision]:
    """The pair of a bundle of either family, and the precision that its weights are stored in."""
    manifest = load_bundle(folder).manifest
    pair = read_mar_pair(folder) if manifest.family == "mar" else read_pair(folder)
    return pair, manifest.precision


def _write(pair: CausalPair | MarPair, out: Path, precision: Precision, compute: Sequence[Precision]) -> None:
    if isinstance(pair, MarPair):
        write_mar_bundle(pair, out, precision=precision, compute=compute)
    else:
        write_bundle(pair, out, precision=precision, compute=compute)


def _install(folder: Path, out: Path) -> None:
    """Copy the finished bundle `folder` to `out`; a bundle that is there is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        replace_bundle(shutil.copytree(folder, Path(scratch, out.name)), out)


if __name__ == "__main__":
    sys.exit(main())
