"""The torch MAR and its VAE decoder against arrays recorded from the public reference implementation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import relative_error

from export.checkpoints import Checkpoint, build_mar, build_vae_decoder, read_checkpoint
from export.models.mar import visible_set
from export.models.vae import VaeDecoder
from specdec_rt.chain import ChainSpec, compile_chain

GOLDEN = Path(__file__).parents[1] / "golden"
STOCK = ChainSpec(steps=25, variance="learned")
KNOWN = (0, 16, 32, 63)


@pytest.fixture(scope="module")
def reference():
    """The recorded arrays: B=3, L=64, D=16, Z=64. Index 0 of a chain is its least noisy step."""
    with np.load(GOLDEN / "mar_reference.npz") as arrays:
        return {
            name: torch.from_numpy(array) if array.dtype.kind in "fi" else array[0] for name, array in arrays.items()
        }


@pytest.fixture(scope="module")
def mar():
    with torch.no_grad():
        yield build_mar(read_checkpoint(GOLDEN / "mar_reference.pth"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def labels(reference, mar, *, dropped):
    """The recorded labels `[B]`, or "no label" for each image."""
    return torch.full_like(reference["labels"], mar.size.classes) if dropped else reference["labels"]


@pytest.mark.parametrize("dropped", [False, True], ids=["label", "no label"])
@pytest.mark.parametrize("known", KNOWN)
def test_z_is_the_references_where_tokens_are_unknown(reference, mar, known, dropped):
    unknown = reference[f"mask_{known}"]
    visible, visible_mask = visible_set(unknown)
    assert visible.shape == (3, known)
    z = mar(reference["tokens"], visible, visible_mask, labels(reference, mar, dropped=dropped))
    expected = reference[f"z_uncond_{known}" if dropped else f"z_{known}"]
    assert relative_error(z[unknown == 1], expected[unknown == 1]) <= 1e-4


def test_images_at_different_steps_run_together(reference, mar):
    """Padding of the visible positions changes nothing, nor do values of unknown tokens."""
    masks = torch.stack([reference[f"mask_{known}"][image] for image, known in enumerate((16, 63, 0))])
    expected = [reference[f"z_{known}"][image] for image, known in enumerate((16, 63, 0))]
    visible, visible_mask = visible_set(masks)
    np.testing.assert_array_equal(visible_mask.sum(1), [16, 63, 0])
    tokens = torch.where(masks[..., None] == 1, 1e3, reference["tokens"])
    z = mar(tokens, visible, visible_mask, reference["labels"])
    assert relative_error(z[masks == 1], torch.stack(expected)[masks == 1]) <= 1e-4


def test_queries_give_z_at_their_positions_alone(reference, mar):
    unknown = reference["mask_32"]
    query = reference["orders"][:, :5].flip(1)
    z = mar(reference["tokens"], *visible_set(unknown), reference["labels"], query)
    rows = torch.arange(3)[:, None]
    assert relative_error(z, reference["z_32"][rows, query]) <= 1e-4


def test_the_comparison_can_fail(reference, mar):
    unknown = reference["mask_32"]
    tokens = 1.01 * reference["tokens"]
    z = mar(tokens, *visible_set(unknown), reference["labels"])
    assert relative_error(z[unknown == 1], reference["z_32"][unknown == 1]) > 1e-4


def predict(mar, state, z, timestep):
    """Noise prediction and variance share, each `[R, D]`."""
    return mar.head(state, mar.head.time_embed(timestep) + mar.head.cond_embed(z)).chunk(2, dim=1)


def test_transitions_are_the_references(reference, mar):
    epsilon, share = predict(mar, reference["head_x"], reference["head_c"], reference["head_timestep"])
    assert relative_error(torch.cat([epsilon, share], dim=1), reference["head_out"]) <= 1e-4
    chain, state = compile_chain(STOCK), reference["head_x"]
    row = 24 - reference["head_step"][:, None]
    of_state, of_epsilon, std, log_std_range = torch.from_numpy(chain.coefficients)[row].unbind(2)  # each [7, 1]
    assert relative_error(of_state * state + of_epsilon * epsilon, reference["p_mean"]) <= 1e-4
    log_variance = 2 * (std.log() + log_std_range * (share + 1) / 2)
    assert relative_error(log_variance, reference["p_log_variance"]) <= 1e-4
    of_state, of_epsilon = torch.from_numpy(np.stack([chain.prediction_state, chain.prediction_epsilon]))[:, row]
    assert relative_error(of_state * state + of_epsilon * epsilon, reference["p_xstart"]) <= 1e-4


def denoise(mar, z, state, noise, *, guidance):
    """A whole chain, noisiest transition first, from `z [G, R, Z]`, `state [R, D]` and `noise [n, R, D]`."""
    chain = compile_chain(replace(STOCK, temperature=0.95))
    for step, (of_state, of_epsilon, std, log_std_range) in enumerate(chain.coefficients):
        predictions = [predict(mar, state, branch, torch.tensor(int(chain.timestep[step]))) for branch in z]
        epsilon = sum(weight * prediction[0] for weight, prediction in zip(guidance, predictions, strict=True))
        share = predictions[0][1]
        state = of_state * state + of_epsilon * epsilon + std * torch.exp(log_std_range * (share + 1) / 2) * noise[step]
    return state


def test_the_reverse_process_is_the_references(reference, mar):
    z, noise = reference["chain_plain_z"][None], reference["chain_plain_noise"]
    found = denoise(mar, z, reference["chain_plain_xT"], noise, guidance=[1.0])
    assert relative_error(found, reference["chain_plain_x"]) <= 1e-3


def test_the_guided_reverse_process_is_the_references(reference, mar):
    z, noise = reference["chain_cfg_z"].unflatten(0, (2, 7)), reference["chain_cfg_noise"][:, :7]
    found = denoise(mar, z, reference["chain_cfg_xT"], noise, guidance=[2.9, -1.9])
    assert relative_error(found, reference["chain_cfg_x"]) <= 1e-3


def vae_keys():
    """Names of the decoder's weights in the published kl16.ckpt, and the size of each layer's kernel."""
    layers = [("post_quant_conv", 1), ("decoder.conv_in", 3), ("decoder.norm_out", 0), ("decoder.conv_out", 3)]
    blocks = ["mid.block_1", "mid.block_2", *(f"up.{level}.block.{block}" for level in range(5) for block in range(3))]
    for block in blocks:
        layers += [(f"decoder.{block}.{name}", size) for name, size in zip(("norm1", "conv1"), (0, 3), strict=True)]
        layers += [(f"decoder.{block}.{name}", size) for name, size in zip(("norm2", "conv2"), (0, 3), strict=True)]
    layers += [(f"decoder.up.{level}.block.0.nin_shortcut", 1) for level in (1, 3)]
    layers += [(f"decoder.up.{level}.upsample.conv", 3) for level in (1, 2, 3, 4)]
    layers += [(f"decoder.mid.attn_1.{name}", 1) for name in ("q", "k", "v", "proj_out")]
    layers += [("decoder.mid.attn_1.norm", 0)]
    return {f"{name}.{part}": size for name, size in layers for part in ("weight", "bias")}


@pytest.fixture(scope="module")
def vae_weights():
    """The weights that the reference's decoder was run with."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in VaeDecoder().state_dict().items()}
    random = np.random.default_rng(16)
    return {
        key: torch.from_numpy(
            random.standard_normal(shapes[key], dtype=np.float32) / np.float32(np.prod(shapes[key][1:]) ** 0.5)
        )
        for key in sorted(shapes)
    }


def test_vae_parameters_are_the_published_ones():
    with torch.device("meta"):
        found = VaeDecoder().state_dict()
    expected = vae_keys()
    assert found.keys() == expected.keys()
    kernels = {key: value.shape[2] for key, value in found.items() if value.dim() == 4}
    assert kernels == {key: size for key, size in expected.items() if size and key.endswith("weight")}


def test_pixels_are_the_references(vae_weights):
    # As in kl16.ckpt, the encoder's weights lie beside the decoder's.
    tensors = vae_weights | {"encoder.conv_in.weight": torch.zeros(1), "quant_conv.weight": torch.zeros(1)}
    decoder = build_vae_decoder(Checkpoint(Path("kl16.ckpt"), tensors, {}))
    with np.load(GOLDEN / "mar_vae.npz") as arrays:
        latents, expected = torch.from_numpy(arrays["latents"]), torch.from_numpy(arrays["pixels"])
    pixels = decoder(latents)
    assert pixels.shape == expected.shape == (1, 3, 32, 48)
    assert relative_error(pixels, expected) <= 1e-4
