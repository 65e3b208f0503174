"""From checkpoints to models: what is inferred, and every way in which a file is refused."""

import argparse
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export.checkpoints import Checkpoint, CheckpointError, build_mar, build_vae_decoder, read_checkpoint
from export.models.mar import PRESETS, Mar, MarSize
from export.models.vae import VaeDecoder

REFERENCE = Path(__file__).parents[1] / "golden" / "mar_reference.pth"
SMALL = MarSize(
    image=32,
    stride=8,
    patch=2,
    channels=4,
    classes=5,
    buffer=3,
    encoder_width=24,
    encoder_depth=2,
    encoder_heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=4,
    head_width=20,
    head_depth=3,
)


@pytest.fixture(scope="module")
def content():
    """What the recorded reference checkpoint holds."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(REFERENCE, weights_only=True)


@pytest.fixture
def checkpoint():
    return read_checkpoint(REFERENCE)


def altered(checkpoint, *, without=(), tensors=(), **args):
    """The checkpoint with some tensors and options left out or replaced."""
    kept = {key: value for key, value in checkpoint.tensors.items() if key not in without}
    options = {key: value for key, value in checkpoint.args.items() if key not in without}
    return Checkpoint(checkpoint.path, kept | dict(tensors), options | args)


def refusal(call, *args, **options):
    """The message that `call` is refused with."""
    with pytest.raises(CheckpointError) as caught:
        call(*args, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def of_size(size, **args):
    """A checkpoint of random weights; its options are `args`."""
    return Checkpoint(Path("small.pth"), Mar(size).state_dict(), args)


def test_the_averaged_weights_are_taken_unless_the_others_are_asked_for(content, tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    held = content | {"model": {key: tensor + 1 for key, tensor in content["model_ema"].items()}}
    torch.save(held | {"optimizer": {"state": {0: {"step": torch.tensor(5.0)}}}, "epoch": 3}, path)
    for checkpoint, key in ((read_checkpoint(path), "model_ema"), (read_checkpoint(path, weights="model"), "model")):
        model = build_mar(checkpoint)
        found = model.state_dict()
        assert found.keys() == held[key].keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in held[key].items())
        assert not model.training


def test_safetensors_give_the_same_model(content, tmp_path):
    save_file(content["model_ema"], tmp_path / "mar.safetensors")
    found = build_mar(read_checkpoint(tmp_path / "mar.safetensors"), heads=(4, 4))
    expected = build_mar(read_checkpoint(REFERENCE))
    assert found.size == expected.size
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in expected.state_dict().items())


def test_a_pickle_of_bare_weights_gives_the_same_model(content, tmp_path):
    for name, new_format in (("zipped", True), ("old", False)):
        torch.save(content["model_ema"], tmp_path / name, _use_new_zipfile_serialization=new_format)
        found = build_mar(read_checkpoint(tmp_path / name), heads=(4, 4)).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in content["model_ema"].items())


def test_half_precision_weights_become_single(checkpoint):
    half = {key: tensor.half() for key, tensor in checkpoint.tensors.items()}
    found = build_mar(altered(checkpoint, tensors=half)).state_dict()
    assert all(torch.equal(tensor, half[key].float()) for key, tensor in found.items())


def test_sizes_are_read_from_the_weights():
    args = {"img_size": 32, "vae_stride": 8, "patch_size": 2, "vae_embed_dim": 4}
    assert build_mar(of_size(SMALL, **args), heads=(2, 4)).size == SMALL
    fixed = replace(SMALL, learned_variance=False)
    assert build_mar(of_size(fixed, **args, encoder_num_heads=2, decoder_num_heads=4)).size == fixed


def test_without_options_latents_are_those_of_the_published_vae():
    size = replace(SMALL, image=64, stride=16, channels=16)
    assert build_mar(of_size(size), heads=(2, 4)).size == size


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_what_weights_do_not_show(name):
    with torch.device("meta"):
        published = of_size(PRESETS[name], model=name)
        assert build_mar(published).size == PRESETS[name]


@pytest.mark.parametrize(("name", "millions"), [("mar_base", 208), ("mar_large", 479), ("mar_huge", 943)])
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Mar(PRESETS[name]).parameters())
    assert math.ceil(parameters / 1e6) == millions


def test_class_embeddings_that_were_never_trained_are_left_out():
    args = {"img_size": 32, "vae_stride": 8, "patch_size": 2, "vae_embed_dim": 4, "class_num": 5}
    model = build_mar(of_size(replace(SMALL, classes=1000), **args), heads=(2, 4))
    assert model.size == SMALL
    assert model.class_emb.weight.shape == (5, 24)


class Attack:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zipped", "old", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, form):
    path, mark = tmp_path / "attack.pth", tmp_path / "mark"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"model_ema": Attack(mark)}, protocol=2))
    else:
        torch.save({"model_ema": Attack(mark)}, path, _use_new_zipfile_serialization=form == "zipped")
    message = refusal(read_checkpoint, path)
    assert message.startswith(f"{path}: its pickle holds {os.mkdir.__module__}.mkdir, which was not loaded")
    assert "save the weights as .safetensors" in message
    assert not mark.exists()


def test_other_classes_in_the_options_are_refused_by_name(content, tmp_path):
    args = argparse.Namespace(**vars(content["args"]), output_dir=Path("out"))
    torch.save(content | {"args": args}, tmp_path / "checkpoint.pth")
    assert f"its pickle holds pathlib.{type(Path()).__name__}" in refusal(read_checkpoint, tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_named(content, tmp_path, suffix, share):
    path = tmp_path / f"mar{suffix}"
    whole = REFERENCE
    if suffix == ".safetensors":
        whole = tmp_path / "whole.safetensors"
        save_file(content["model_ema"], whole)
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    message = refusal(read_checkpoint, path)
    assert message.startswith(f"{path}: not a complete ")
    assert message.endswith("download it again")


@pytest.mark.parametrize("junk", [b"junk", b"\x80\x02}q\x00", b"PK\x03\x04 no archive", b"<html>not found</html>"])
def test_a_file_of_another_kind_is_named(tmp_path, junk):
    path = tmp_path / "mar.ckpt"
    path.write_bytes(junk)
    message = refusal(read_checkpoint, path)
    assert message.startswith(f"{path}: not a complete torch checkpoint")
    assert "weights_only" not in message


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "folder.pth", "folder.safetensors"])
def test_a_path_without_a_file_is_named(tmp_path, name):
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    assert refusal(read_checkpoint, path).startswith(f"{path}: cannot be read (")


@pytest.mark.parametrize(
    ("held", "weights", "expected"),
    [
        ([1, 2], "ema", "holds a list; expected a dict of weights"),
        ({"model": {}}, "ema", "model_ema is missing; expected a dict of weights; take the other set: --weights model"),
        ({"model": {}, "model_ema": None}, "ema", "model_ema is a NoneType; expected a dict of weights"),
        ({"model_ema": {}}, "model", "model is missing; expected a dict of weights"),
        ({"model_ema": {"epoch": 3}}, "ema", "'epoch' is a int; expected a name and a tensor"),
        ({"state_dict": {}}, "ema", "'state_dict' is a dict; expected a name and a tensor"),
        ({0: torch.zeros(1)}, "ema", "0 is a Tensor; expected a name and a tensor"),
        ({"model_ema": {}, "args": "mar_base"}, "ema", "args is a str; expected argparse.Namespace"),
    ],
)
def test_a_file_of_another_layout_is_refused_by_key(tmp_path, held, weights, expected):
    path = tmp_path / "checkpoint.pth"
    torch.save(held, path)
    assert refusal(read_checkpoint, path, weights=weights).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("z_proj.weight", "z_proj.weight is missing; expected a tensor of 2 dimensions"),
        ("mask_token", "mask_token is missing; expected float[1, 1, 64]"),
        ("encoder_blocks.1.mlp.fc2.bias", "encoder_blocks.1.mlp.fc2.bias is missing; expected float[64]"),
    ],
)
def test_missing_weights_are_named(checkpoint, key, expected):
    assert refusal(build_mar, altered(checkpoint, without=[key])).startswith(f"{REFERENCE}: {expected}")


def test_a_missing_block_is_named_by_its_first_weights(checkpoint):
    first = [key for key in checkpoint.tensors if key.startswith("encoder_blocks.0.")]
    message = refusal(build_mar, altered(checkpoint, without=first))
    assert "encoder_blocks.0.attn.proj.bias (and 11 more) is missing; expected float[64]" in message


def test_surplus_weights_are_named(checkpoint):
    surplus = {"pos_embed": torch.zeros(2), "cls_token": torch.zeros(2)}
    assert "cls_token (and 1 more) is surplus; expected no such" in refusal(
        build_mar, altered(checkpoint, tensors=surplus)
    )


@pytest.mark.parametrize(
    ("key", "tensor", "expected"),
    [
        ("mask_token", torch.zeros(1, 1, 32), "float32[1, 1, 32]; expected float[1, 1, 64]"),
        ("decoder_norm.bias", torch.zeros(64, dtype=torch.int8), "int8[64]; expected float[64]"),
        ("z_proj.weight", torch.zeros(64), "of shape [64]; expected 2 dimensions, none of them 0"),
        ("z_proj.weight", torch.zeros(64, 0), "of shape [64, 0]; expected 2 dimensions, none of them 0"),
        ("z_proj.weight", torch.zeros(64, 8), "for tokens of 8 values; expected 16 (vae_embed_dim 16 × patch_size 1²)"),
        ("encoder_pos_embed_learned", torch.zeros(1, 64, 64), "of 64 positions; expected more than the 64"),
    ],
)
def test_misshapen_weights_are_named(checkpoint, key, tensor, expected):
    message = refusal(build_mar, altered(checkpoint, tensors={key: tensor}))
    assert message.startswith(f"{REFERENCE}: {key} is {expected}")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("img_size", 256, "diffusion_pos_embed_learned is for 64 tokens; expected (img_size 256 / vae_stride 16"),
        ("vae_stride", 8, "diffusion_pos_embed_learned is for 64 tokens; expected (img_size 128 / vae_stride 8"),
        ("patch_size", 2, "z_proj.weight is for tokens of 16 values; expected 64 (vae_embed_dim 16 × patch_size 2²)"),
        ("vae_embed_dim", 4, "z_proj.weight is for tokens of 16 values; expected 4 (vae_embed_dim 4 × patch_size 1²)"),
        ("patch_size", 0, "args.patch_size is 0; expected a whole number above 0"),
        ("img_size", "128", "args.img_size is '128'; expected a whole number above 0"),
        ("buffer_size", 64, "args.buffer_size is 64; expected 8, which encoder_pos_embed_learned shows"),
        ("class_num", 1000, "args.class_num is 1000; expected 10, which class_emb.weight shows"),
        ("diffloss_w", 1024, "args.diffloss_w is 1024; expected 64, which diffloss.net.input_proj.weight shows"),
        ("diffloss_d", 3, "args.diffloss_d is 3; expected 2, which the number of diffloss.net.res_blocks shows"),
        ("model", "mar_base", "args.model is 'mar_base' (encoder_width 768); expected encoder_width 64"),
        ("encoder_num_heads", 5, "args.encoder_num_heads is 5; expected a divisor of the width 64"),
        ("decoder_num_heads", None, "args.decoder_num_heads is None; expected a whole number above 0"),
    ],
)
def test_options_that_contradict_the_weights_are_named(checkpoint, name, value, expected):
    message = refusal(build_mar, altered(checkpoint, **{name: value}))
    assert message.startswith(f"{REFERENCE}: {expected}")


def test_unknown_head_counts_are_asked_for(checkpoint):
    unknown = altered(checkpoint, without=["encoder_num_heads", "decoder_num_heads"])
    message = refusal(build_mar, unknown)
    assert "args.encoder_num_heads is missing; expected a number, or args.model one of mar_base (12,12)" in message
    assert message.endswith("pass --heads E,D")
    assert build_mar(unknown, heads=(4, 8)).size.decoder_heads == 8


@pytest.mark.parametrize(
    ("heads", "expected"),
    [((4, 3), "decoder_num_heads is 3; expected a divisor of the width 64"), ((0, 4), "encoder_num_heads is 0")],
)
def test_impossible_head_counts_are_named(checkpoint, heads, expected):
    unknown = altered(checkpoint, without=["encoder_num_heads", "decoder_num_heads"])
    assert f"args.{expected}" in refusal(build_mar, unknown, heads=heads)


def test_head_counts_must_be_those_that_the_file_gives(checkpoint):
    assert build_mar(checkpoint, heads=(4, 4)).size.encoder_heads == 4
    message = refusal(build_mar, checkpoint, heads=(4, 8))
    assert "args.decoder_num_heads is 4; expected 8, which --heads gives; leave out --heads" in message


@pytest.fixture(scope="module")
def vae_weights():
    """Zeros of the decoder's shapes, which take no memory."""
    with torch.device("meta"):
        expected = VaeDecoder().state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in expected.items()}


def test_a_vae_checkpoint_loads_without_its_encoder(tmp_path, vae_weights):
    encoder = {"encoder.conv_in.weight": torch.zeros(1), "quant_conv.bias": torch.zeros(1)}
    torch.save({"model": vae_weights | encoder}, tmp_path / "kl16.ckpt")
    decoder = build_vae_decoder(read_checkpoint(tmp_path / "kl16.ckpt", weights="model"))
    assert decoder.state_dict().keys() == vae_weights.keys()
    assert not decoder.training


@pytest.mark.parametrize(
    ("key", "tensor", "expected"),
    [
        ("decoder.conv_in.weight", None, "missing; expected float[512, 16, 3, 3]"),
        ("post_quant_conv.weight", torch.zeros(4, 4, 1, 1), "float32[4, 4, 1, 1]; expected float[16, 16, 1, 1]"),
        ("decoder.up.4.attn.0.q.bias", torch.zeros(512), "surplus; expected no such weights"),
    ],
)
def test_weights_that_are_not_the_vae_decoders_are_named(vae_weights, key, tensor, expected):
    tensors = {name: value for name, value in vae_weights.items() if name != key}
    if tensor is not None:
        tensors[key] = tensor
    message = refusal(build_vae_decoder, Checkpoint(Path("kl16.ckpt"), tensors, {}))
    assert message.startswith(f"kl16.ckpt: {key} is {expected}")
