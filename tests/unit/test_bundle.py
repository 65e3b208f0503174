"""Bundles are checked before any engine is made; what is wrong is named."""

import re
import sys

import pytest
from bundles import copy_bundle, edit_manifest, read_manifest

import specdec_rt
from specdec_rt.bundle import MANIFEST, SCHEMA_VERSION, embedded_bundles, load_bundle
from specdec_rt.errors import BackendError, BundleError

GRAPH = "target.denoise_step.onnx"


@pytest.fixture
def folder(tmp_path):
    return copy_bundle(tmp_path / "copy")


def refusal(folder):
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_embedded_bundle_is_sound():
    assert embedded_bundles() == ["digits", "digits-mar"]
    bundle = load_bundle("digits")
    assert bundle.manifest.name == "digits"
    assert set(bundle.manifest.files) == {path.name for path in bundle.folder.iterdir()} - {MANIFEST}


def test_a_copy_loads_from_any_folder(folder):
    assert load_bundle(folder).manifest == load_bundle(str(folder)).manifest == load_bundle("digits").manifest


@pytest.mark.parametrize("name", ["nothing", "", "a\0b"])
def test_no_bundle_there(name):
    with pytest.raises(BundleError, match=r"no bundle at .* expected a folder that holds manifest.json.*digits"):
        load_bundle(name)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"{", b"not json", lambda whole: whole[:-200]])
def test_manifest_that_is_no_json(folder, damage):
    path = folder / MANIFEST
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    message = refusal(folder)
    assert message.startswith(f"{path} cannot be read as JSON")
    assert "export the bundle again" in message


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "1", None])
def test_another_schema_version(folder, version):
    edit_manifest(folder, "schema_version", value=version)
    message = refusal(folder)
    assert f"schema_version {version!r}" in message
    assert f"this release reads {SCHEMA_VERSION}" in message
    assert "install the release that wrote it" in message


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}"])
def test_manifest_that_is_no_manifest(folder, content):
    (folder / MANIFEST).write_text(content)
    assert "schema_version None" in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("colour",), "red", "colour"),
        (("chain", "drop_lats"), 2, "chain.drop_lats"),
        (("target", "graphs", "backbone", "size"), 2, "target.graphs.backbone.size"),
        (("defaults", "mode"), "fast", "defaults.mode"),
        (("defaults", "draft_length"), 0, "defaults.draft_length"),
        (("tokens",), "49", "tokens"),
        (("tokens",), 0, "tokens"),
        (("family",), "diffusion", "family"),
        (("image", "channels"), 4, "image.channels"),
        (("target", "graphs", "speak"), {}, "target.graphs.speak"),
        (("files", "../escape"), "0" * 64, "files"),
        (("chain", "steps"), 1, "chain.steps"),
        (("chain", "final_std"), -0.5, "chain.final_std"),
        (("chain", "variance"), "tiny", "variance"),
    ],
)
def test_a_field_that_cannot_be_is_named(folder, keys, value, named):
    edit_manifest(folder, *keys, value=value)
    message = refusal(folder)
    assert message.startswith(f"{folder / MANIFEST}: ")
    assert named in message


@pytest.mark.parametrize(
    "keys", [("chain",), ("target",), ("defaults", "draft"), ("target", "graphs", "backbone", "file")]
)
def test_a_missing_field_is_named(folder, keys):
    manifest = read_manifest(folder)
    *path, last = keys
    parent = manifest
    for key in path:
        parent = parent[key]
    del parent[last]
    edit_manifest(folder, keys[0], value=manifest.get(keys[0]))
    message = refusal(folder)
    assert keys[0] in message


def test_altered_file(folder):
    path = folder / GRAPH
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    message = refusal(folder)
    assert message.startswith(f"{path} has SHA-256 ")
    assert re.search(r"the manifest says [0-9a-f]{64}.*copy or export the bundle again", message)


@pytest.mark.parametrize("name", [GRAPH, "target.safetensors"])
def test_truncated_file(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} has SHA-256 " in refusal(folder)


@pytest.mark.parametrize("name", [GRAPH, "target.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    assert f"{folder / name} cannot be read (No such file" in refusal(folder)


def test_wrong_hash_in_the_manifest(folder):
    edit_manifest(folder, "files", GRAPH, value="0" * 64)
    assert f"the manifest says {'0' * 64}" in refusal(folder)


@pytest.mark.parametrize(("owner", "graph"), [("target", "path_means"), ("target", "backbone")])
def test_missing_graph(folder, owner, graph):
    graphs = read_manifest(folder)[owner]["graphs"]
    del graphs[graph]
    edit_manifest(folder, owner, "graphs", value=graphs)
    message = refusal(folder)
    assert f"{owner} has the graphs" in message
    assert f"'{graph}'" in message.split("expected")[1]


def test_graph_whose_file_is_not_listed(folder):
    edit_manifest(folder, "target", "graphs", "backbone", "file", value="other.onnx")
    assert "target.graphs.backbone names 'other.onnx', which is not in files" in refusal(folder)


def test_variants_are_found(folder):
    bundle = load_bundle(folder)
    graph = bundle.manifest.target.graphs["backbone"]
    assert bundle.path(graph) == bundle.path(graph, "fp32") == folder / "target.backbone.onnx"
    assert bundle.path(graph, "bf16") == folder / "target.backbone.bf16.onnx"


def test_a_variant_that_was_not_exported(folder):
    variants = read_manifest(folder)["target"]["graphs"]["backbone"]["variants"]
    edit_manifest(folder, "target", "graphs", "backbone", "variants", value={"fp16": variants["fp16"]})
    bundle = load_bundle(folder)
    with pytest.raises(BundleError) as caught:
        bundle.path(bundle.manifest.target.graphs["backbone"], "bf16")
    assert str(caught.value) == (
        f"{folder}: target.backbone.onnx was exported to compute in fp32, fp16, not in bf16; "
        "export the bundle again with --compute bf16"
    )


def test_a_manifest_from_before_there_were_variants(folder):
    graph = read_manifest(folder)["target"]["graphs"]["backbone"]
    del graph["variants"]
    edit_manifest(folder, "target", "graphs", "backbone", value=graph)
    assert load_bundle(folder).manifest.target.graphs["backbone"].variants == {}


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ({"fp16": "other.onnx"}, "target.graphs.backbone names 'other.onnx', which is not in files"),
        ({"fp32": "target.backbone.onnx"}, "target.graphs.backbone.variants has 'fp32'"),
        ({"int8": "target.backbone.fp16.onnx"}, "target.graphs.backbone.variants.int8"),
    ],
)
def test_variants_that_cannot_be(folder, variants, said):
    edit_manifest(folder, "target", "graphs", "backbone", "variants", value=variants)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("inputs", 0, "name"), "token"),
        (("inputs", 0, "dtype"), "int64"),
        (("inputs", 0, "shape"), ["B", "N", 17]),
        (("outputs", 0, "shape"), ["N", "B", 192]),
    ],
)
def test_changed_bindings(folder, keys, value):
    edit_manifest(folder, "target", "graphs", "backbone", *keys, value=value)
    message = refusal(folder)
    assert "bindings of target.graphs.backbone (target.backbone.onnx)" in message
    assert "export the bundle again" in message


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("token_dim",), 8, "is not 49 tokens of 8"),
        (("tokens",), 50, "is not 50 tokens of 16"),
        (("defaults", "draft"), "nobody", "defaults.draft is 'nobody'"),
        (("defaults", "ar_steps"), 48, "defaults.ar_steps is 48, expected in the causal family exactly 49"),
        (("chain", "variance"), "learned", "a causal family's head predicts no variance"),
        (("family",), "mar", "target.cache is given, but the family is 'mar'"),
        (("target", "cache"), None, "target.cache is missing, but the family is 'causal'"),
        (("target", "head"), "target", "a target needs a head of its own"),
        (("drafts", "adapter", "z_dim"), 64, "drives the target's head but its z_dim is 64"),
        (("drafts", "adapter", "head_width"), 64, "drafts.adapter.head is 'target' but its head_width is 64"),
    ],
)
def test_fields_that_contradict_each_other(folder, keys, value, said):
    edit_manifest(folder, *keys, value=value)
    assert said in refusal(folder)


def test_no_engine_is_made_of_a_refused_bundle(folder, monkeypatch):
    """The backend's module is loaded, its library never asked to read a file."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("an engine was made"))
    (folder / GRAPH).write_bytes(b"")
    with pytest.raises(BundleError):
        specdec_rt.load(folder)


def test_a_graph_that_the_backend_cannot_read(folder):
    """Its hash is right, so it was exported like this: the backend's fault to tell, and a failure, not bad input."""
    import hashlib

    (folder / "target.backbone.onnx").write_bytes(b"no graph")
    edit_manifest(folder, "files", "target.backbone.onnx", value=hashlib.sha256(b"no graph").hexdigest())
    pipeline = specdec_rt.load(folder)
    with pytest.raises(BackendError, match=r"cannot load .*target\.backbone\.onnx") as caught:
        pipeline.generate([1], mode="target")
    assert caught.value.exit_code == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_folder_can_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert load_bundle(tmp_path / "link").manifest.name == "digits"


def test_a_file_that_the_manifest_does_not_list(folder):
    (folder / "more.safetensors").write_bytes(b"weights that no hash covers")
    assert "more.safetensors is not in the manifest's files: remove it" in refusal(folder)


def test_weights_that_no_hash_covers(folder):
    files = read_manifest(folder)["files"]
    del files["target.safetensors"]
    edit_manifest(folder, "files", value=files)
    assert "target.safetensors is not in the manifest's files" in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("image", "height"), 30, "image 30x28 cannot be tiled by patches of 4"),
        (("chain", "steps"), "25", "chain.steps"),
        (("chain", "temperature"), True, "chain.temperature"),
        (("defaults", "guidance"), float("inf"), "defaults.guidance"),
        (("defaults", "draft"), "none", "defaults.draft is 'none'"),
    ],
)
def test_values_that_cannot_be(folder, keys, value, said):
    edit_manifest(folder, *keys, value=value)
    assert said in refusal(folder)


@pytest.mark.parametrize("name", ["self", "target"])
def test_a_draft_with_a_name_that_is_taken(folder, name):
    drafts = read_manifest(folder)["drafts"]
    edit_manifest(folder, "drafts", value={**drafts, name: drafts["small"]})
    assert f"a draft is called {name!r}" in refusal(folder)


def test_a_bundle_without_any_draft(folder):
    edit_manifest(folder, "drafts", value={})
    edit_manifest(folder, "defaults", "draft", value="self")
    stats = specdec_rt.load(folder).generate([1], prefill=0.9).stats
    assert stats.draft_backbone_calls == 0
    assert stats.accepted > 0


def test_graphs_that_changed_places(folder):
    """The manifest and the hashes agree, the files themselves do not."""
    graphs = read_manifest(folder)["target"]["graphs"]
    edit_manifest(folder, "target", "graphs", "path_means", "file", value=graphs["denoise_step"]["file"])
    pipeline = specdec_rt.load(folder)
    with pytest.raises(BundleError, match=r"denoise_step\.onnx has other inputs than the manifest says"):
        pipeline.generate([1], mode="target")
