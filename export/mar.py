"""Write a bundle of a published MAR checkpoint, alone or with a draft.

`python -m export.mar --checkpoint FILE --out DIR`. Every graph is compared with torch. A line for each finished file
goes to stderr.
"""

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import torch

from export.bundles import require_replaceable
from export.checkpoints import Checkpoint, build_mar, build_vae_decoder, read_checkpoint
from export.console import print_line
from export.mar_models import MarPair, image_layout, write_mar_bundle
from export.models.mar import Mar, MarSize
from export.precision import compute_precisions
from specdec_rt.bundle import file_sha256
from specdec_rt.chain import ChainSpec, compile_chain
from specdec_rt.config import SELF_DRAFT, Mode
from specdec_rt.errors import SpecDecError, UsageError
from specdec_rt.manifest import Defaults, Precision

__all__ = ["GUIDANCE", "MarExport", "main", "read_export"]

DRAFT = "draft"
"""The draft's name in the bundle."""
EXACT_T_MAX = 975
"""First training step of an exact chain: the transition out of step 999 alone would make acceptance 0."""
GUIDANCE = {"mar_base": 2.9, "mar_large": 3.0, "mar_huge": 3.2}
"""The published guidance scales, by the name that a checkpoint gives to its model."""
AR_STEPS = 64
"""Default where a checkpoint does not say: that of the published code (its README's evaluation takes 256)."""
STEPS = "100"
"""Denoising steps where a checkpoint does not say: those of the published models."""
NO_DRAFT_NOTE = (
    "note: without a draft this stock chain can be run in mode target alone; "
    "--chain exact would let the target draft for itself (--draft self)"
)


@dataclass(frozen=True, kw_only=True)
class MarExport:
    """What a command line asks for, read and checked but not yet written."""

    pair: MarPair
    out: Path
    precision: Precision
    """in which weights are stored"""
    compute: Sequence[Precision]
    """half precisions that graphs get a variant for"""

    def write(self) -> None:
        """Write the bundle; see `write_contents`."""
        write_mar_bundle(self.pair, self.out, precision=self.precision, compute=self.compute)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the bundle; returns the exit code."""
    try:
        export = read_export(sys.argv[1:] if argv is None else argv)
        if export.pair.defaults.mode == "target":
            print_line(NO_DRAFT_NOTE)
        export.write()
    except SpecDecError as error:
        print_line(f"error: {error}")
        return error.exit_code
    return 0


def read_export(argv: Sequence[str]) -> MarExport:
    """Parse options and read the checkpoints that they name.

    Raises a SpecDecError where options or checkpoints contradict each other, and where `--out` cannot be replaced.
    """
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out.resolve()
    require_replaceable(out)
    command = shlex.join(["python", "-m", "export.mar", *argv])
    pair = _read(arguments, arguments.name or out.name, command)
    return MarExport(pair=pair, out=out, precision=arguments.precision, compute=arguments.compute)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.mar", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="TARGET.pth", help="the target: .pth or .safetensors")
    add("--draft", type=Path, metavar="DRAFT.pth", help="a smaller model of the same tokens")
    add("--vae", type=Path, metavar="kl16.ckpt", help="the VAE whose decoder makes pixels of the tokens")
    add(
        "--weights",
        choices=["ema", "model"],
        default="ema",
        help="which of a .pth's two sets of weights (default: %(default)s)",
    )
    add(
        "--heads",
        type=_heads,
        metavar="E,D",
        help="the target's attention heads in encoder and decoder, where its file does not say",
    )
    add("--draft-heads", type=_heads, metavar="E,D", help="the draft's attention heads")
    add(
        "--chain",
        choices=["stock", "exact"],
        default="stock",
        help="the published sampler, or one for mode exact (default: %(default)s)",
    )
    add("--steps", type=int, metavar="N", help="denoising steps (default: what the checkpoint says, or 100)")
    add("--drop-last", type=int, metavar="K", help="with --chain exact: leave out the K least noisy steps (default: 0)")
    add(
        "--final-std",
        type=float,
        metavar="S",
        help="with --chain exact: noise of the last step (default: the posterior's)",
    )
    add(
        "--precision", choices=get_args(Precision), default="fp32", help="how weights are stored (default: %(default)s)"
    )
    add(
        "--compute",
        type=compute_precisions,
        default="fp32,fp16",
        metavar="LIST",
        help="what graphs can compute in, of fp32, fp16 and bf16; fp32 is always written (default: %(default)s)",
    )
    add("--name", help="the bundle's name (default: its folder's)")
    add("--out", type=Path, required=True, metavar="DIR", help="the bundle's folder; a bundle there is replaced")
    return parser


def _heads(text: str) -> tuple[int, int]:
    encoder, _, decoder = text.partition(",")
    if not (encoder.isdecimal() and decoder.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, encoder and decoder, as in 12,12")
    return int(encoder), int(decoder)


def _read(arguments: argparse.Namespace, name: str, command: str) -> MarPair:
    """Read the models and the chain that the options ask for."""
    checkpoints = {"target": _read_checkpoint(arguments.checkpoint, arguments.weights)}
    target = build_mar(checkpoints["target"], heads=arguments.heads)
    chain = _chain(arguments, checkpoints["target"], target.size)
    drafts: dict[str, Mar] = {}
    if arguments.draft is not None:
        checkpoints[DRAFT] = _read_checkpoint(arguments.draft, arguments.weights)
        drafts[DRAFT] = build_mar(checkpoints[DRAFT], heads=arguments.draft_heads, option="--draft-heads")
        _require_alike(checkpoints[DRAFT], drafts[DRAFT].size, checkpoints["target"], target.size, chain)
    elif arguments.draft_heads is not None:
        raise UsageError("--draft-heads is given without a draft; add --draft DRAFT.pth")
    vae = None
    if arguments.vae is not None:
        image_layout(target.size, vae=True)  # before the file is read: refuses a model of other latents
        checkpoints["vae"] = _read_checkpoint(arguments.vae, "model")  # its other set was never published
        vae = build_vae_decoder(checkpoints["vae"])
    return MarPair(
        name=name,
        target=target,
        drafts=drafts,
        chain=chain,
        defaults=_defaults(arguments, checkpoints["target"], target.size),
        vae=vae,
        provenance=_provenance(arguments, checkpoints, command),
    )


def _read_checkpoint(path: Path, weights: Literal["ema", "model"]) -> Checkpoint:
    print_line(f"reading {path}")
    return read_checkpoint(path, weights=weights)


def _chain(arguments: argparse.Namespace, checkpoint: Checkpoint, size: MarSize) -> ChainSpec:
    steps = arguments.steps
    if steps is None:
        text = str(checkpoint.args.get("num_sampling_steps", STEPS))
        if not text.isdecimal():
            raise checkpoint.error("args.num_sampling_steps", repr(text), "a number of steps", "pass --steps N")
        steps = int(text)
    if arguments.chain == "stock":
        for option in ("drop_last", "final_std"):
            if getattr(arguments, option) is not None:
                given = f"--{option.replace('_', '-')}"
                raise UsageError(f"{given} is given, but the stock chain is as published; add --chain exact")
        return ChainSpec(steps=steps, variance="learned" if size.learned_variance else "large", emit="sample")
    spec = ChainSpec(steps=steps, t_max=EXACT_T_MAX, drop_last=arguments.drop_last or 0, emit="mean")
    final_std = arguments.final_std
    spec = replace(spec, final_std=compile_chain(spec).final_density_std if final_std is None else final_std)
    compile_chain(spec).require_density_ratio()
    return spec


def _require_alike(draft: Checkpoint, size: MarSize, target: Checkpoint, wanted: MarSize, chain: ChainSpec) -> None:
    """Raise CheckpointError where draft and target have different tokens, or only one predicts variances in use."""
    fields = ["tokens", "token_dim", "classes", "stride", "patch"]
    if chain.variance == "learned":
        fields.append("learned_variance")
    for name in fields:
        found, expected = getattr(size, name), getattr(wanted, name)
        if found != expected:
            mend = "take a draft that was trained for the target's tokens"
            raise draft.error(name, found, f"{expected}, as in {target.path}", mend)


def _defaults(arguments: argparse.Namespace, checkpoint: Checkpoint, size: MarSize) -> Defaults:
    has_draft = arguments.draft is not None
    stock_mode: Mode = "paper" if has_draft else "target"
    return Defaults(
        mode="exact" if arguments.chain == "exact" else stock_mode,
        draft=DRAFT if has_draft else SELF_DRAFT,
        draft_length=4,
        guidance=GUIDANCE.get(str(checkpoint.args.get("model")), 1.0),
        guidance_schedule="linear",
        ar_steps=min(checkpoint.count("num_iter", AR_STEPS), size.tokens),
    )


def _provenance(arguments: argparse.Namespace, checkpoints: dict[str, Checkpoint], command: str) -> dict[str, Any]:
    return {
        "command": command,
        "checkpoints": {
            role: {"file": checkpoint.path.name, "sha256": file_sha256(checkpoint.path)}
            for role, checkpoint in checkpoints.items()
        },
        "weights": arguments.weights,
        "chain": arguments.chain,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "onnx": onnx.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
