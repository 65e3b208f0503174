"""A bundle with one more draft, `DRAFT-int8`: like DRAFT, but with int8 weights in its head's `denoise_step`.

`python -m benchmarks.int8_draft BUNDLE DRAFT OUT` writes it, unless OUT holds just that already.

What it gives on `digits` (adapter, γ 4, 12 draft steps), compared with the same draft in single precision, of whose
tokens 0.73 are accepted. Requests took turns on one core with AVX-512 VNNI, while others were at work on the machine:

| quantised | accepted | time, batch 1 | batch 16 |
|---|---|---|---|
| `denoise_step`, a scale for each weight matrix | 0.70 | 0.88 | 1.00 |
| the same, a scale for each of its columns | 0.69 | 0.93 | 1.03 |
| `modulation`, by columns | 0.59 | 1.00 | 1.06 |
| both, by columns | 0.59 | 1.00 | 1.07 |

A call of `modulation` takes 0.36 of its time in int8, but the rejections cost more than that gains.

Is mode `exact` still exact? Activations are quantised in each call, with one scale for all rows of the call. So the
draft of a token depends, by about as much as rounding, on the tokens drafted in the same call. Where a call drafts one
token (a causal bundle, one image per batch) that makes no difference: `exact` is exact whatever the draft computes.
Elsewhere the noise of a dropped token, which is used again later, has had a small say in the states of other tokens in
its call, and through them in the means that it is added to. There `exact` is exact but for that, and a seed's image
depends on its batch.
"""

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from safetensors import safe_open

from benchmarks.derived import made_of, run_writer
from export.bundles import replace_bundle, require_replaceable, write_manifest
from specdec_rt.bundle import Bundle, file_sha256, load_bundle
from specdec_rt.errors import OutputError, UsageError
from specdec_rt.manifest import HEAD_GRAPHS, MANIFEST, Family, GraphName, Model

__all__ = ["int8_draft", "main", "quantise"]

NARROWEST = 64
"""Products of weights with fewer rows or columns stay in single precision: they would be no faster, and less exact."""
PROVENANCE = "int8_draft"
"""Key of the manifest's provenance that says what such a bundle was made of."""
HEAD_WEIGHTS: Mapping[Family, str] = {"causal": "head.", "mar": "diffloss."}
"""How the names of a head's weights begin."""


def int8_draft(source: str | Path, draft: str, out: Path, *, per_channel: bool = False) -> bool:
    """Copy the bundle (a folder, or an embedded one's name) to `out` and add the draft. Returns whether it had to.

    With `per_channel` each column of a weight matrix has a scale of its own. Raises UsageError where there is no such
    draft or `out` is the bundle itself, OutputError where `out` holds something else or cannot be written.
    """
    bundle = load_bundle(source)
    _require(bundle, draft, out)
    require_replaceable(out)
    note = {
        "draft": draft,
        "source_manifest": file_sha256(bundle.folder / MANIFEST),
        "per_channel": per_channel,
        "narrowest": NARROWEST,
        "onnxruntime": onnxruntime.__version__,
    }
    if made_of(out, PROVENANCE) == note:
        return False
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        _write(bundle, draft, note, folder)
        folder.chmod(0o755)
        replace_bundle(folder, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error}); choose another place") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return True


def quantise(source: Path, path: Path, *, per_channel: bool) -> None:
    """Write the graph at `source` to `path` with its wide products in int8. Bindings stay, weights lie inside."""
    with tempfile.TemporaryDirectory() as passing:
        folded = Path(passing) / "folded.onnx"
        _fold(source, folded)
        model = onnx.load(folded)
    kept = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    narrow = [node.name for node in products if min(shapes.get(node.input[1], [0])) < NARROWEST]
    add_pre_process_metadata(model)  # or it advises to fold first
    quantize_dynamic(
        model,
        path,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,  # QUInt8 takes 0.8 to 1.07 of the time in single precision, this 0.6
        # A Gemm is made a MatMul of another name before names are compared.
        nodes_to_exclude=[name + ending for name in narrow for ending in ("", "_MatMul")],
    )
    quantised = onnx.load(path)
    onnx.helper.set_model_props(quantised, kept)
    onnx.save(quantised, path)
    onnx.checker.check_model(str(path), full_check=True)


def _require(bundle: Bundle, draft: str, out: Path) -> None:
    drafts = bundle.manifest.drafts
    if draft not in drafts:
        known = ", ".join(drafts) or "none: there is no draft in it"
        raise UsageError(f"{bundle.folder} has no draft {draft!r}; expected one of its drafts ({known})")
    if _name(draft) in drafts:
        raise UsageError(f"{bundle.folder} has a draft {_name(draft)!r} already; expected the bundle without it")
    if out.resolve() == bundle.folder.resolve():
        raise UsageError(f"{out} is the bundle itself; expected another folder to write to")


def _name(draft: str) -> str:
    return f"{draft}-int8"


def _write(bundle: Bundle, draft: str, note: Mapping[str, Any], folder: Path) -> None:
    """Write every file of the new bundle to `folder`, and check it."""
    manifest = bundle.manifest
    for file in manifest.files:
        shutil.copyfile(bundle.folder / file, folder / file)
    record = manifest.drafts[draft]
    head = record if record.head == "own" else manifest.target
    graphs = {GraphName.BACKBONE: record.graphs[GraphName.BACKBONE]}
    graphs |= {graph: head.graphs[graph] for graph in HEAD_GRAPHS}
    step = graphs[GraphName.DENOISE_STEP]
    file = f"{_name(draft)}.{GraphName.DENOISE_STEP}.onnx"
    quantise(folder / step.file, folder / file, per_channel=note["per_channel"])
    graphs[GraphName.DENOISE_STEP] = step.model_copy(update={"file": file, "variants": {}})
    added = record.model_copy(
        update={
            "parameters": _parameters(bundle, record),
            "head": "own",
            "head_width": head.head_width,
            "modulation_width": head.modulation_width,
            "graphs": graphs,
        }
    )
    made = manifest.model_copy(
        update={
            "drafts": {**manifest.drafts, _name(draft): added},
            "files": {**manifest.files, file: file_sha256(folder / file)},
            "provenance": {**manifest.provenance, PROVENANCE: note},
        }
    )
    write_manifest(folder, made)
    load_bundle(folder)


def _parameters(bundle: Bundle, record: Model) -> int:
    """A draft's parameters, with those of the head that it drives."""
    if record.head == "own":
        return record.parameters
    of_head = HEAD_WEIGHTS[bundle.manifest.family]
    with safe_open(bundle.folder / "target.safetensors", "np") as weights:
        names = [name for name in weights.keys() if name.startswith(of_head)]  # noqa: SIM118  # it is no mapping
        return record.parameters + sum(int(math.prod(weights.get_slice(name).get_shape())) for name in names)


def _fold(source: Path, path: Path) -> None:
    """Write the graph at `source` to `path` with its weights as constants in single precision, which can be quantised.

    In a bundle's graph they are what Cast, Transpose and Concat make of the stored weights.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the bundle. Returns 0, or the exit code of what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.int8_draft", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", help="the name of an embedded bundle, or a bundle's folder")
    parser.add_argument("draft", help="the name of a draft in that bundle")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the new bundle")
    given = parser.parse_args(argv)
    return run_writer(lambda: int8_draft(given.bundle, given.draft, given.out), given.out)


if __name__ == "__main__":
    sys.exit(main())
