"""Bundles of MAR models: what their manifests say, what they generate, models read back, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.agreement import PRECISION_TOLERANCE
from export.checkpoints import build_mar, read_checkpoint
from export.mar_models import image_layout, read_mar_pair
from export.models.mar import MarBackbone
from specdec_rt import load
from specdec_rt.bundle import file_sha256, load_bundle
from specdec_rt.chain import ChainSpec
from specdec_rt.cli.inspect import bundle_record
from specdec_rt.errors import BackendError, BundleError, ChainError, UsageError
from specdec_rt.manifest import Defaults

REFERENCE = Path(__file__).parents[1] / "golden" / "mar_reference.pth"


def test_export_replaces_a_bundle_as_a_whole(stock):
    assert {path.name for path in stock.iterdir()} == {"manifest.json", *load_bundle(stock).manifest.files}
    assert [path.name for path in stock.parent.iterdir()] == [stock.name]


def test_a_stock_bundle_says_what_it_holds(stock):
    manifest = load_bundle(stock).manifest
    assert (manifest.family, manifest.name, manifest.precision) == ("mar", "reference", "fp32")
    assert (manifest.tokens, manifest.token_dim, manifest.classes) == (64, 16, 10)
    assert manifest.chain == ChainSpec(steps=25, t_max=999, variance="learned", emit="sample")
    assert (manifest.image, manifest.decoder, manifest.drafts) == (None, None, {})
    assert manifest.defaults == Defaults(
        mode="target", draft="self", draft_length=4, guidance=1.0, guidance_schedule="linear", ar_steps=64
    )
    assert manifest.target.parameters == sum(p.numel() for p in build_mar(read_checkpoint(REFERENCE)).parameters())
    origin = manifest.provenance["checkpoints"]["target"]
    assert origin == {"file": "mar_reference.pth", "sha256": file_sha256(REFERENCE)}
    assert max(manifest.provenance["relative_error_against_torch"].values()) <= 1e-5
    assert "relative_error_of_precision" not in manifest.provenance


def test_an_exact_bundle_says_what_it_holds(exact, pair):
    manifest = load_bundle(exact).manifest
    assert (manifest.chain, manifest.precision) == (pair.chain, "fp16")
    layout = manifest.image
    assert (layout.height, layout.width, layout.channels, layout.patch) == (64, 64, 3, 16)
    assert (manifest.drafts["adapter"].head, manifest.drafts["adapter"].head_width) == ("target", None)
    rounding = manifest.provenance["relative_error_of_precision"]
    assert rounding.keys() == manifest.provenance["relative_error_against_torch"].keys()
    assert len(rounding) == 7
    assert all(1e-5 < error < 5e-3 for error in rounding.values())
    half = (exact / "target.safetensors").stat().st_size
    assert half == pytest.approx(2 * manifest.target.parameters, rel=0.02)


def test_every_graph_has_its_variants(stock, exact):
    for folder, halves in ((stock, ["fp16"]), (exact, ["fp16", "bf16"])):
        bundle = load_bundle(folder)
        manifest = bundle.manifest
        graphs = [graph for model in (manifest.target, *manifest.drafts.values()) for graph in model.graphs.values()]
        graphs += [manifest.decoder.graph] if manifest.decoder else []
        errors = dict(manifest.provenance["relative_error_of_variants"])
        for graph in graphs:
            assert list(graph.variants) == halves
            for half in halves:
                assert 1e-5 < errors.pop(bundle.path(graph, half).name) < PRECISION_TOLERANCE[half]
        assert errors == {}


def test_images_are_decoded_from_their_tokens(exact):
    result = load(exact).generate([1, 2, 3], seed=2)
    tokens, vae = torch.from_numpy(result.tokens), read_mar_pair(exact).vae
    with torch.no_grad():
        expected = vae(tokens.transpose(1, 2).reshape(3, 16, 4, 4) / 0.2325).permute(0, 2, 3, 1)
    assert result.images.shape == (3, 64, 64, 3)
    exact_bytes = ((expected.clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(result.images - exact_bytes).max() <= 0.51
    assert result.images.std() > 10


def test_models_come_back_from_a_bundle(stock, exact, pair):
    original, again = build_mar(read_checkpoint(REFERENCE)), read_mar_pair(stock)
    assert again.target.size == original.size
    assert (again.vae, again.drafts, again.chain.variance) == (None, {}, "learned")
    for name, parameter in original.state_dict().items():
        assert torch.equal(again.target.state_dict()[name], parameter)
    again = read_mar_pair(exact)
    draft = again.drafts["adapter"]
    assert type(draft) is MarBackbone
    assert (draft.size, draft.z_dim) == (pair.drafts["adapter"].size, 64)
    pairs = [(again.target, pair.target), (draft, pair.drafts["adapter"]), (again.vae, pair.vae)]
    for found, wanted in pairs:
        assert found.state_dict().keys() == wanted.state_dict().keys()
        for name, parameter in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[name], parameter.half().float())


def test_a_bundle_of_another_family_is_refused():
    with pytest.raises(BundleError, match=r"family 'causal'; expected one of 'mar'"):
        read_mar_pair("digits")


def test_pixels_are_known_where_tokens_are_pixels():
    size = build_mar(read_checkpoint(REFERENCE)).size
    digits = replace(size, image=28, stride=1, patch=4, channels=1)
    layout = image_layout(digits, vae=False)
    assert (layout.height, layout.width, layout.channels, layout.patch) == (28, 28, 1, 4)
    assert image_layout(replace(digits, channels=2), vae=False) is None
    assert image_layout(size, vae=False) is None
    with pytest.raises(UsageError, match=r"vae_stride 1 and vae_embed_dim 1; .* takes 16 and 16; leave out --vae"):
        image_layout(digits, vae=True)


def test_weights_without_a_description_are_refused(stock, tmp_path):
    folder = tmp_path / "altered"
    folder.mkdir()
    for path in stock.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "target.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"mar":', b'"ram":', 1))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][weights.name] = file_sha256(weights)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="metadata describe no MAR model; export the bundle again"):
        read_mar_pair(folder)


def test_a_stock_bundle_without_a_draft_offers_target_mode_alone(stock):
    works = {mode: entry["works"] for mode, entry in bundle_record(load_bundle(stock))["modes"].items()}
    assert works == {"target": True, "exact": False, "paper": False, "draft": False}
    pipeline = load(stock)
    assert pipeline.generate([1], ar_steps=2).images is None
    with pytest.raises(ChainError, match=r"chain\.variance is 'learned'; .* --chain exact"):
        pipeline.generate([1], mode="exact")
    for mode in ("paper", "draft"):
        with pytest.raises(UsageError, match=r"take mode 'target', or export again with a draft$"):
            pipeline.generate([1], mode=mode)


def test_a_step_left_out_has_no_learned_variance(stock):
    with pytest.raises(UsageError, match="draft_steps is 5, but the chain's variances are learned"):
        load(stock).generate([1], draft_steps=5)


def test_a_broken_decoder_is_seen_before_any_token_is_made(exact, tmp_path):
    folder = Path(shutil.copytree(exact, tmp_path / "copy"))
    graph = folder / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][graph.name] = file_sha256(graph)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    made = []
    with pytest.raises(BackendError, match=r"decoder\.onnx"):
        load(folder).generate([1], progress=lambda done, total: made.append((done, total)))
    assert made == []
