"""The published MAR sizes with seeded random weights: exported, loaded, one short generation with the VAE.

    python -m benchmarks.mar_sizes --work DIR --out FILE.json [--sizes base,large,huge] [--precisions fp32,fp16]

Random weights draw nothing, but sizes, memory and time are those of the published checkpoints, whose format
they are saved in. Each stage is a command of its own, run as a user would; peak memory is its resident set.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from export.models.mar import PRESETS, Mar
from export.models.vae import VaeDecoder

AR_STEPS = 8
LABEL = 207


@dataclass(frozen=True)
class Stage:
    """What one command took."""

    seconds: float
    peak_bytes: int


def randomise(module: nn.Module, seed: int) -> None:
    """Weights of about unit gain, none of them zero: a zero layer would hide whatever lies before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            std = 0.5 * fan_in**-0.5 if parameter.dim() > 1 else 0.02
            parameter.normal_(0, std, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1)


def save_mar(name: str, path: Path) -> None:
    """Write a random model as a published checkpoint."""
    size = PRESETS[name]
    model = Mar(size)
    randomise(model, seed=0)
    options = argparse.Namespace(
        model=name,
        img_size=size.image,
        vae_embed_dim=size.channels,
        vae_stride=size.stride,
        patch_size=size.patch,
        class_num=size.classes,
        buffer_size=size.buffer,
        diffloss_w=size.head_width,
        diffloss_d=size.head_depth,
        num_sampling_steps="100",
        num_iter=64,
    )
    torch.save({"model_ema": model.state_dict(), "epoch": 0, "args": options}, path)


def save_vae(path: Path) -> None:
    """Write a random decoder as the published VAE checkpoint."""
    decoder = VaeDecoder()
    randomise(decoder, seed=1)
    torch.save({"model": decoder.state_dict()}, path)


def run(words: Sequence[object]) -> tuple[Stage, str]:
    """Run a command to its end; its standard output."""
    command = [str(word) for word in words]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Stage(time.perf_counter() - started, usage.ru_maxrss * 1024), output


def measure(name: str, precision: str, work: Path) -> dict[str, Any]:
    """Export one size at one precision, then generate one image in `AR_STEPS` steps."""
    checkpoint, vae, bundle = work / f"{name}.pth", work / "kl16.ckpt", work / f"{name}-{precision}"
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Mar(PRESETS[name]).parameters())
    if not checkpoint.exists():
        save_mar(name, checkpoint)
    if not vae.exists():
        save_vae(vae)
    command = [sys.executable, "-m", "export.mar", "--checkpoint", checkpoint, "--vae", vae, "--chain", "exact"]
    export, _ = run([*command, "--precision", precision, "--out", bundle])
    command = [Path(sys.executable).with_name("specdec-rt"), "generate", bundle, "--labels", LABEL, "--mode", "target"]
    generate, output = run([*command, "--ar-steps", AR_STEPS, "--out", work / f"{bundle.name}.png", "--json"])
    manifest = json.loads((bundle / "manifest.json").read_text())
    provenance = manifest["provenance"]
    parameters += manifest["decoder"]["parameters"]
    return {
        "model": name,
        "precision": precision,
        "parameters": parameters,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.iterdir()),
        "export": asdict(export),
        "export_peak_over_fp32_weights": export.peak_bytes / (4 * parameters),
        "generate": asdict(generate),
        "generate_image_seconds": json.loads(output)["seconds"],
        "relative_error_against_torch": provenance.get("relative_error_against_torch"),
        "relative_error_of_precision": provenance.get("relative_error_of_precision"),
    }


def report(rows: list[dict[str, Any]]) -> Table:
    """The figures as a table."""
    table = Table(*("model", "weights", "bundle", "export", "peak / fp32 weights", "load", "8 AR steps and VAE"))
    for row in rows:
        image = row["generate_image_seconds"]
        table.add_row(
            f"{row['model']} {row['precision']}",
            f"{row['parameters'] / 1e6:.0f}M",
            f"{row['bundle_bytes'] / 1e9:.2f} GB",
            f"{row['export']['seconds']:.0f} s",
            f"{row['export_peak_over_fp32_weights']:.2f}",
            f"{row['generate']['seconds'] - image:.0f} s",
            f"{image:.0f} s",
        )
    return table


def main() -> None:
    """Measure every size and precision asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mar_sizes", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and bundles, some 12 GB for mar_huge")
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    parser.add_argument("--sizes", default="base,large,huge")
    parser.add_argument("--precisions", default="fp32,fp16")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    machine = {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "command": " ".join(["python -m benchmarks.mar_sizes", *sys.argv[1:]]),
    }
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes.split(","):
        for precision in arguments.precisions.split(","):
            rows.append(measure(f"mar_{size}", precision, arguments.work))
            part = arguments.out.with_suffix(".part")
            part.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
            part.replace(arguments.out)
    Console().print(report(rows))


if __name__ == "__main__":
    main()
