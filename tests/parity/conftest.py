"""Bundles that several files compare with torch, exported once."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch_threads import one_torch_thread

from export import mar as command
from export.checkpoints import build_mar, read_checkpoint
from export.mar_models import MarPair, write_mar_bundle
from export.models.mar import Mar, MarBackbone
from export.models.vae import VaeDecoder
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import ChainSpec
from specdec_rt.manifest import Defaults

REFERENCE = Path(__file__).parents[1] / "golden" / "mar_reference.pth"
EXACT = ChainSpec(steps=8, t_max=975, drop_last=1, final_std=0.05, variance="large", emit="mean")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    with one_torch_thread():
        yield


@pytest.fixture(scope="session")
def written_once(tmp_path_factory):
    """A function that fills a folder once in a run, also where several workers ask for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # common to all workers

    def write_once(name, write):
        folder, part = root / name, root / f"{name}.part"
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(part, ignore_errors=True)  # of a worker in which `write` failed
                part.mkdir()
                write(part)
                part.rename(folder)
        return folder

    return write_once


@pytest.fixture(scope="session")
def stock(written_once):
    """The reference's weights and sampler as the command writes them, in the place of an older bundle."""

    def write(folder):
        out = folder / "reference"
        shutil.copytree(load_bundle("digits").folder, out)
        (out / "left-over").write_text("from before")
        assert command.main(["--checkpoint", str(REFERENCE), "--out", str(out)]) == 0

    return written_once("stock", write) / "reference"


def randomised(module, seed):
    """The module with random weights, none of them zero, whose outputs are about as large as its inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.eval()


@pytest.fixture(scope="session")
def pair():
    """A target of 16 tokens whose head predicts variances, a draft that drives that head, and a VAE."""
    size = build_mar(read_checkpoint(REFERENCE)).size
    size = replace(size, image=64, encoder_depth=1, decoder_depth=1, head_depth=1)
    target = randomised(Mar(size), 0)
    size = replace(size, encoder_width=32, decoder_width=48)
    return MarPair(
        name="pair",
        target=target,
        drafts={"adapter": randomised(MarBackbone(size, adapter_dim=target.z_dim), 1)},
        chain=EXACT,
        defaults=Defaults(
            mode="exact", draft="adapter", draft_length=2, guidance=2.0, guidance_schedule="linear", ar_steps=8
        ),
        vae=randomised(VaeDecoder(), 2),
        provenance={"weights": "random"},
    )


@pytest.fixture(scope="session")
def exact(pair, written_once):
    """The pair's bundle, with weights in fp16 and graphs in every precision."""

    def write(folder):
        write_mar_bundle(pair, folder / "pair", precision="fp16", compute=["fp16", "bf16"])

    return written_once("exact", write) / "pair"
