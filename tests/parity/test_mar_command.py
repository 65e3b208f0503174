"""`python -m export.mar`: what options ask for, defaults, refusals, and exports that fail."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorder import random_mar, save_published

from export import mar as command
from export.mar_models import write_mar_bundle
from export.models.mar import Mar
from export.models.vae import VaeDecoder
from specdec_rt.chain import ChainSpec, compile_chain

REFERENCE = Path(__file__).parents[1] / "golden" / "mar_reference.pth"


@pytest.fixture
def content():
    """What the reference's checkpoint holds."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(REFERENCE, weights_only=True)


def saved(path, content, **args):
    """The path of a checkpoint with other options; one that is None is left out."""
    options = {key: value for key, value in {**vars(content["args"]), **args}.items() if value is not None}
    torch.save({**content, "args": argparse.Namespace(**options)}, path)
    return str(path)


@pytest.fixture
def read(tmp_path):
    """What options ask for, before anything is written."""
    return lambda *options: command.read_export([*map(str, options), "--out", str(tmp_path / "out")])


def test_an_exact_chain_takes_the_posteriors_noise(read):
    export = read("--checkpoint", REFERENCE, "--chain", "exact", "--drop-last", 2, "--precision", "bf16")
    bare = ChainSpec(steps=25, t_max=975, drop_last=2, emit="mean")
    assert export.pair.chain == replace(bare, final_std=compile_chain(bare).final_density_std)
    assert (export.pair.defaults.mode, export.pair.defaults.draft) == ("exact", "self")
    assert (export.precision, export.compute) == ("bf16", ("fp16",))
    chain = read("--checkpoint", REFERENCE, "--chain", "exact", "--steps", 50, "--final-std", 0.1).pair.chain
    assert (chain.steps, chain.drop_last, chain.final_std) == (50, 0, 0.1)


def test_a_draft_makes_the_stock_chain_speculative(read):
    pair = read("--checkpoint", REFERENCE, "--draft", REFERENCE, "--name", "two").pair
    assert (pair.name, pair.defaults.mode, pair.defaults.draft) == ("two", "paper", "draft")
    assert type(pair.drafts["draft"]) is Mar
    assert pair.provenance["checkpoints"].keys() == {"target", "draft"}
    assert pair.provenance["command"].startswith("python -m export.mar --checkpoint")


def test_a_vae_as_published_becomes_the_decoder(read, pair, tmp_path):
    torch.save({"model": pair.vae.state_dict() | {"encoder.x": torch.zeros(1)}}, tmp_path / "kl16.ckpt")
    found = read("--checkpoint", REFERENCE, "--vae", tmp_path / "kl16.ckpt").pair
    assert isinstance(found.vae, VaeDecoder)
    assert "vae" in found.provenance["checkpoints"]


def test_defaults_are_the_published_ones(read, content, tmp_path):
    silent = {"model": None, "num_sampling_steps": None, "encoder_num_heads": None, "decoder_num_heads": None}
    path = saved(tmp_path / "x.pth", content, num_iter=12, **silent)
    pair = read("--checkpoint", path, "--heads", "4,4").pair
    assert (pair.chain.steps, pair.defaults.guidance, pair.defaults.ar_steps) == (100, 1.0, 12)
    assert command.GUIDANCE["mar_large"] == 3.0


def refusal(capsys, tmp_path, *options, code=2):
    """The line that the command refuses with, before it writes anything."""
    assert command.main([*map(str, options), "--out", str(tmp_path / "out")]) == code
    assert not (tmp_path / "out").exists()
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(each.startswith("reading ") for each in progress)
    assert line.startswith("error: ")
    return line


def test_a_draft_of_other_tokens_is_refused(content, tmp_path, capsys):
    tensors = content["model_ema"] | {"class_emb.weight": content["model_ema"]["class_emb.weight"][:7]}
    draft = saved(tmp_path / "draft.pth", {**content, "model_ema": tensors}, class_num=7)
    line = refusal(capsys, tmp_path, "--checkpoint", REFERENCE, "--draft", draft)
    assert line.startswith(f"error: {draft}: classes is 7; expected 10, as in {REFERENCE}; take a draft that")


def test_a_draft_without_variances_is_refused_where_they_are_learned(read, content, tmp_path, capsys):
    halved = {
        name: tensor[:16] if name.startswith("diffloss.net.final_layer.linear") else tensor
        for name, tensor in content["model_ema"].items()
    }
    draft = saved(tmp_path / "draft.pth", {**content, "model_ema": halved})
    line = refusal(capsys, tmp_path, "--checkpoint", REFERENCE, "--draft", draft)
    assert "draft.pth: learned_variance is False; expected True, as in" in line
    assert read("--checkpoint", REFERENCE, "--draft", draft, "--chain", "exact").pair.chain.variance == "large"


def test_a_draft_whose_heads_nobody_says_is_asked_for_by_its_own_option(content, tmp_path, capsys):
    silent = {"model": None, "encoder_num_heads": None, "decoder_num_heads": None}
    draft = saved(tmp_path / "draft.pth", content, **silent)
    line = refusal(capsys, tmp_path, "--checkpoint", REFERENCE, "--draft", draft, "--heads", "4,4")
    assert line.endswith("pass --draft-heads E,D")


def test_weights_that_half_precision_cannot_hold_are_named(tmp_path, capsys):
    model = random_mar()
    model.z_proj.weight.data[0, 0] = 7e4
    save_published(model, tmp_path / "large.pth")
    argv = ["--checkpoint", str(tmp_path / "large.pth"), "--precision", "fp16", "--out", str(tmp_path / "out")]
    assert command.main(argv) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == command.NO_DRAFT_NOTE
    assert lines[-1].startswith("error: target.backbone.onnx with weights in fp16 differs from the unrounded model")
    assert lines[-1].endswith("store them in single precision: --precision fp32")
    assert not (tmp_path / "out").exists()


def test_a_vae_of_other_latents_is_refused(content, tmp_path, capsys):
    path = saved(tmp_path / "x.pth", content, vae_stride=8, img_size=64)
    line = refusal(capsys, tmp_path, "--checkpoint", path, "--vae", tmp_path / "kl16.ckpt")
    assert "vae_stride 8 and vae_embed_dim 16; the KL-16 decoder takes 16 and 16" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--final-std", 0.1], "--final-std is given, but the stock chain is as published; add --chain exact"),
        (["--drop-last", 0], "--drop-last is given, but the stock chain is as published; add --chain exact"),
        (["--chain", "exact", "--final-std", 0], "chain.final_std is 0.0; export with final_std of about 0.1"),
        (["--chain", "exact", "--drop-last", 25], "chain.drop_last is 25; expected 0 to steps - 1 = 24"),
        (["--steps", 1], "chain.steps is 1; expected 2 to"),
        (["--draft-heads", "4,4"], "--draft-heads is given without a draft; add --draft DRAFT.pth"),
        (["--draft", "nowhere.pth"], "nowhere.pth: cannot be read (No such file or directory)"),
        (["--weights", "model"], "model is"),
    ],
)
def test_options_are_refused(tmp_path, capsys, options, message, content):
    path = saved(tmp_path / "x.pth", {**content, "model": None})
    assert message in refusal(capsys, tmp_path, "--checkpoint", path, *options)


def test_a_sampler_that_is_no_number_of_steps_is_refused(content, tmp_path, capsys):
    path = saved(tmp_path / "x.pth", content, num_sampling_steps="ddim25")
    line = refusal(capsys, tmp_path, "--checkpoint", path)
    assert "args.num_sampling_steps is 'ddim25'; expected a number of steps; pass --steps N" in line


def test_argparse_refuses_the_rest(tmp_path, capsys):
    for options in (["--heads", "12"], ["--precision", "int8"], ["--compute", "fp8"], []):
        with pytest.raises(SystemExit) as caught:
            command.main([*options, "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
    assert "--checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text"), [("letter.txt", "dear"), ("manifest.json", '{"name": "an extension"}')])
def test_what_is_no_bundle_is_not_replaced(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    assert command.main(["--checkpoint", "nowhere.pth", "--out", str(tmp_path)]) == 2
    assert "holds something that is no bundle" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_interrupted_export_leaves_nothing(pair, tmp_path):
    class Interrupted(Mar):
        def forward(self, *_):
            assert any(tmp_path.rglob("target.safetensors"))
            raise KeyboardInterrupt

    target = Interrupted(pair.target.size)
    with pytest.raises(KeyboardInterrupt):
        write_mar_bundle(replace(pair, target=target, drafts={}, vae=None), tmp_path / "out", precision="fp32")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_runs_out_of_space_leaves_nothing(tmp_path, capsys):
    resource = pytest.importorskip("resource", reason="only POSIX systems limit the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights are 1.2 MB
    try:
        assert command.main(["--checkpoint", str(REFERENCE), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"out cannot be written \(.*File too large.*\); choose another place", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    out = tmp_path / "letter.txt" / "out"
    assert command.main(["--checkpoint", str(REFERENCE), "--out", str(out)]) == 2
    assert f"error: {out} cannot be written ([Errno" in capsys.readouterr().err
