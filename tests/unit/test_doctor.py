"""`doctor`, and `inspect` of engines."""

import json
import shutil

import pytest

from specdec_rt.backends.nvidia_driver import find_gpu
from specdec_rt.build.builder import EngineBuilder
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import default_recipe
from specdec_rt.bundle import load_bundle

GRAPH = "target.time_embedding"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    """Tests leave the user's own cache and state alone."""
    for name in ("CACHE", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def entry():
    """The smallest graph's engine, in the user's cache."""
    pytest.importorskip("tensorrt_rtx")
    bundle, cache = load_bundle("digits"), EngineCache()
    builder = EngineBuilder.open(bundle, default_recipe("tensorrt-rtx"), cache)
    slot = next(slot for slot in bundle_graphs(bundle.manifest) if slot.label == GRAPH)
    _, built = builder.engine(slot)
    return cache.lookup(built.key)


# --- doctor --------------------------------------------------------------------------------------------


def test_doctor_json_holds_all_backends_and_leaves_no_files(run, tmp_path):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert list(record["backends"]) == ["tensorrt-rtx", "tensorrt", "cuda", "onnxruntime"]
    assert record["backends"]["onnxruntime"]["usable"]
    assert record["auto"] is not None
    assert record["packages"]["numpy"] is not None
    assert record["problems"] == []
    assert (record["driver"]["why_not"] is None) == (find_gpu() is not None)
    folder = str(tmp_path / "CACHE" / "specdec-rt" / "engines")
    assert record["engine_cache"] == {"folder": folder, "engines": 0, "size_bytes": 0, "problem": None}
    assert not list(tmp_path.rglob("*specdec*"))


def test_doctor_shows_packages_driver_backends_and_cache(run):
    code, out, _ = run("doctor")
    assert code == 0
    for words in ("onnxruntime-gpu", "driver and GPUs", "runs on the CPU", "backend auto takes", "engine cache"):
        assert words in out


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_doctor_says_once_that_there_is_no_driver(run):
    _, out, _ = run("doctor")
    assert out.count("no NVIDIA driver") == 1
    assert out.count("no driver, see above") == 3


def test_doctor_shows_what_tensorrt_rtx_can_do(run):
    pytest.importorskip("tensorrt_rtx")
    _, out, _ = run("doctor", "--json")
    capabilities = json.loads(out)["capabilities"]["tensorrt-rtx"]
    assert "SM89" in capabilities["compute_capabilities"]
    assert "what tensorrt-rtx can do" in run("doctor")[1]


def test_doctor_counts_the_engines_in_the_cache(run, entry):
    _, out, _ = run("doctor", "--cache", entry.path.parent, "--json")
    cache = json.loads(out)["engine_cache"]
    assert (cache["engines"], cache["size_bytes"]) == (1, entry.path.stat().st_size)


def test_doctor_works_where_the_cache_cannot_be_used(run, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, out, _ = run("doctor", "--cache", tmp_path / "file", "--json")
    assert code == 0
    assert json.loads(out)["engine_cache"]["engines"] == 0


# --- inspect -------------------------------------------------------------------------------------------


def test_inspect_shows_the_bindings_and_profiles_of_an_engine(run, entry):
    code, out, err = run("inspect", entry.path)
    assert (code, err) == (0, "")
    for words in (f"digits: {GRAPH}", "fp32", "tensorrt-rtx", "timestep [n] int64", "[23]", entry.key):
        assert words in out


def test_inspect_finds_an_engine_by_its_record(run, entry):
    code, out, _ = run("inspect", entry.path.with_suffix(".json"), "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["key"], record["graph"], record["bundle"]) == (entry.key, GRAPH, "digits")
    assert record["profiles"] == {"timestep": {"min": [1], "opt": [23], "max": [23]}}
    assert record["plan_bytes"] == entry.path.stat().st_size


def test_inspect_lists_the_engines_of_a_bundle_and_the_graphs_without_one(run, entry):
    code, out, _ = run("inspect", "digits", "--engines", "--json")
    assert code == 0
    assert [record["key"] for record in json.loads(out)] == [entry.key]
    _, out, _ = run("inspect", "digits", "--engines")
    assert entry.key in out
    assert "no engine in the cache: target.backbone, target.modulation" in out
    assert json.loads(run("inspect", "digits-mar", "--engines", "--json")[1]) == []


def test_inspect_lists_only_the_engines_that_a_recipe_makes(run, entry, tmp_path):
    recipe = tmp_path / "rtx.toml"
    recipe.write_text('backend = "tensorrt-rtx"\n')
    own = json.loads(run("inspect", "digits", "--engines", "--recipe", recipe, "--json")[1])
    assert [record["key"] for record in own] == [entry.key]
    recipe.write_text('backend = "tensorrt-rtx"\nbuilder_level = 1\n')
    assert json.loads(run("inspect", "digits", "--engines", "--recipe", recipe, "--json")[1]) == []


def test_inspect_refuses_an_altered_record_and_removes_nothing(run, entry, tmp_path):
    foreign = tmp_path / "copied"
    shutil.copytree(entry.path.parent, foreign)
    record = foreign / f"{entry.key}.json"
    record.write_text(record.read_text().replace("digits", "stigid"))
    code, out, err = run("inspect", foreign / entry.path.name)
    assert (code, out) == (2, "")
    assert "is not an engine that was built and recorded on this machine" in err
    assert record.is_file()  # `inspect` removes nothing


def test_inspect_writes_nothing_into_a_folder_that_is_no_cache(run, tmp_path):
    plan = tmp_path / "mine.plan"
    plan.write_bytes(b"made by hand")
    code, _, err = run("inspect", plan)
    assert code == 2
    assert "is not an engine" in err
    assert list(tmp_path.iterdir()) == [plan]


@pytest.mark.parametrize("option", [("--recipe", "x.toml"), ("--cache", "x")])
def test_inspect_options_for_engines_ask_for_the_engines_flag(run, option):
    code, _, err = run("inspect", "digits", *option)
    assert (code, err) == (2, f"error: {option[0]} applies to engines only; add --engines\n")
