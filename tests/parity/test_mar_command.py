"""`python -m export.mar`: options, defaults, refusals."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export import bundles
from export import mar as command
from export.models.mar import Mar
from export.models.vae import VaeDecoder
from specdec_rt.chain import ChainSpec, compile_chain

REFERENCE = Path(__file__).parents[1] / "golden" / "mar_reference.pth"


@pytest.fixture
def content():
    """What the reference's file holds."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(REFERENCE, weights_only=True)


def saved(path, content, **args):
    """A checkpoint with some of its options set; None leaves one out."""
    options = {key: value for key, value in {**vars(content["args"]), **args}.items() if value is not None}
    torch.save({**content, "args": argparse.Namespace(**options)}, path)
    return str(path)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The pair that options ask for, which is not written, and how it would be."""

    def ask(*options):
        written = []
        monkeypatch.setattr(command, "write_mar_bundle", lambda pair, _, **options: written.append((pair, options)))
        assert command.main([*map(str, options), "--out", str(tmp_path / "out")]) == 0
        return written[0]

    return ask


def test_an_exact_chain_takes_the_posteriors_noise(asked):
    pair, options = asked("--checkpoint", REFERENCE, "--chain", "exact", "--drop-last", 2, "--precision", "bf16")
    bare = ChainSpec(steps=25, t_max=975, drop_last=2, emit="mean")
    assert pair.chain == replace(bare, final_std=compile_chain(bare).final_density_std)
    assert (pair.defaults.mode, pair.defaults.draft) == ("exact", "self")
    assert options == {"precision": "bf16", "compute": ("fp16",)}
    pair, _ = asked("--checkpoint", REFERENCE, "--chain", "exact", "--steps", 50, "--final-std", 0.1)
    assert (pair.chain.steps, pair.chain.drop_last, pair.chain.final_std) == (50, 0, 0.1)


def test_a_draft_makes_the_stock_chain_speculative(asked):
    pair, _ = asked("--checkpoint", REFERENCE, "--draft", REFERENCE, "--name", "two")
    assert (pair.name, pair.defaults.mode, pair.defaults.draft) == ("two", "paper", "draft")
    assert type(pair.drafts["draft"]) is Mar
    assert pair.provenance["checkpoints"].keys() == {"target", "draft"}
    assert pair.provenance["command"].startswith("python -m export.mar --checkpoint")


def test_a_vae_as_published_becomes_the_decoder(asked, pair, tmp_path):
    torch.save({"model": pair.vae.state_dict() | {"encoder.x": torch.zeros(1)}}, tmp_path / "kl16.ckpt")
    found, _ = asked("--checkpoint", REFERENCE, "--vae", tmp_path / "kl16.ckpt")
    assert isinstance(found.vae, VaeDecoder)
    assert "vae" in found.provenance["checkpoints"]


def test_defaults_are_the_published_ones(asked, content, tmp_path, capsys):
    silent = {"model": None, "num_sampling_steps": None, "encoder_num_heads": None, "decoder_num_heads": None}
    path = saved(tmp_path / "x.pth", content, num_iter=12, **silent)
    pair, _ = asked("--checkpoint", path, "--heads", "4,4")
    assert (pair.chain.steps, pair.defaults.guidance, pair.defaults.ar_steps) == (100, 1.0, 12)
    assert "mode target alone; --chain exact would" in capsys.readouterr().err
    assert command.GUIDANCE["mar_large"] == 3.0


def refusal(capsys, tmp_path, *options, code=2):
    """The one line that the command refuses with."""
    assert command.main([*map(str, options), "--out", str(tmp_path / "out")]) == code
    assert not (tmp_path / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_draft_of_other_tokens_is_refused(content, tmp_path, capsys):
    tensors = content["model_ema"] | {"class_emb.weight": content["model_ema"]["class_emb.weight"][:7]}
    draft = saved(tmp_path / "draft.pth", {**content, "model_ema": tensors}, class_num=7)
    line = refusal(capsys, tmp_path, "--checkpoint", REFERENCE, "--draft", draft)
    assert line.startswith(f"error: {draft}: classes is 7; expected 10, as in {REFERENCE}; take a draft that")


def test_a_draft_without_variances_is_refused_where_they_are_learned(asked, content, tmp_path, capsys):
    halved = {
        name: tensor[:16] if name.startswith("diffloss.net.final_layer.linear") else tensor
        for name, tensor in content["model_ema"].items()
    }
    draft = saved(tmp_path / "draft.pth", {**content, "model_ema": halved})
    line = refusal(capsys, tmp_path, "--checkpoint", REFERENCE, "--draft", draft)
    assert "draft.pth: learned_variance is False; expected True, as in" in line
    pair, _ = asked("--checkpoint", REFERENCE, "--draft", draft, "--chain", "exact")
    assert pair.chain.variance == "large"


def test_a_draft_whose_heads_nobody_says_is_asked_for_by_its_own_option(content, tmp_path, capsys):
    silent = {"model": None, "encoder_num_heads": None, "decoder_num_heads": None}
    draft = saved(tmp_path / "draft.pth", content, **silent)
    line = refusal(capsys, tmp_path, "--checkpoint", REFERENCE, "--draft", draft, "--heads", "4,4")
    assert line.endswith("pass --draft-heads E,D")


def test_weights_that_half_precision_cannot_hold_are_named(content, tmp_path, capsys):
    weights = {**content["model_ema"]}
    weights["z_proj.weight"] = weights["z_proj.weight"].clone()
    weights["z_proj.weight"][0, 0] = 7e4
    path = saved(tmp_path / "x.pth", {**content, "model_ema": weights})
    assert command.main(["--checkpoint", path, "--precision", "fp16", "--out", str(tmp_path / "out")]) == 1
    assert "with weights in fp16 differs from the unrounded model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_graph_that_half_precision_cannot_compute_is_named(content, tmp_path, capsys):
    weights = {**content["model_ema"]}
    weights["z_proj.weight"] = weights["z_proj.weight"].clone()
    weights["z_proj.weight"][0, 0] = 7e4
    path = saved(tmp_path / "x.pth", {**content, "model_ema": weights})
    assert command.main(["--checkpoint", path, "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: target.backbone.fp16.onnx differs from single precision by nan")
    assert line.endswith("leave fp16 out of --compute")
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


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys, reason):
    def fail(*_):
        assert any(tmp_path.rglob("target.safetensors"))
        raise reason

    monkeypatch.setattr(bundles, "export_graph", fail)
    argv = ["--checkpoint", str(REFERENCE), "--out", str(tmp_path / "out")]
    if isinstance(reason, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            command.main(argv)
    else:
        assert command.main(argv) == 2
        assert "out cannot be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
