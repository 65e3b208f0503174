"""Bundles that several files compare with torch, exported once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export import mar as command
from export.checkpoints import build_mar, read_checkpoint
from export.mar_models import MarPair, write_mar_bundle
from export.models.mar import Mar, MarBackbone
from export.models.vae import VaeDecoder
from specdec_rt.chain import ChainSpec
from specdec_rt.manifest import Defaults

REFERENCE = Path(__file__).parents[1] / "golden" / "mar_reference.pth"
EXACT = ChainSpec(steps=8, t_max=975, drop_last=1, final_std=0.05, variance="large", emit="mean")


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """The reference's weights and sampler, as the command writes them."""
    out = tmp_path_factory.mktemp("stock") / "reference"
    assert command.main(["--checkpoint", str(REFERENCE), "--out", str(out)]) == 0
    return out


def randomised(module, seed):
    """Without layers that are zero at first, and with outputs of about their inputs' size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.eval()


@pytest.fixture(scope="session")
def pair():
    """A target of 16 tokens, whose head predicts variances, with a draft that drives that head, and a VAE."""
    size = replace(build_mar(read_checkpoint(REFERENCE)).size, image=64, encoder_depth=1, decoder_depth=1)
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
def exact(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "pair"
    write_mar_bundle(pair, out, precision="fp16", compute=["fp16", "bf16"])
    return out
