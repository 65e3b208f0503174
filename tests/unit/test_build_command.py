"""`specdec-rt build` with the real TensorRT-RTX: engines, cache, interrupts, concurrent builds, trust."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from bundles import copy_bundle, edit_manifest, read_manifest
from rich.console import Console

from specdec_rt.backends.nvidia_driver import Gpu, find_gpu
from specdec_rt.build.builder import BuiltGraph, EngineBuilder, build_bundle
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.engine_record import engine_key
from specdec_rt.build.recipe import default_recipe, read_recipe
from specdec_rt.bundle import file_sha256, load_bundle
from specdec_rt.cli.build import build_reporter
from specdec_rt.errors import BackendError, RecipeError

RECIPE = 'backend = "tensorrt-rtx"\nbuilder_level = 0\nbatch_buckets = [1]\n'
GRAPHS = [f"target.{name}" for name in ("backbone", "time_embedding", "modulation", "denoise_step", "path_means")]

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory):
    """A signing secret of these tests' own, and a TensorRT that fails a test in which a plan is deserialised."""

    class Forbidden(trt.Runtime):
        def __init__(self, *_):
            raise AssertionError("a plan was about to be deserialised")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        # TensorRT's own runtime: it would need a GPU to load a plan, and a test could not see that it was asked to.
        patch.setattr(trt, "Runtime", Forbidden)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bundle of the digits' target alone, a recipe, and a cache that `first` filled."""
    folder = tmp_path_factory.mktemp("place")
    lone = copy_bundle(folder / "lone")
    surplus = [name for name in read_manifest(lone)["files"] if not name.startswith("target.")]
    for name in surplus:
        (lone / name).unlink()
    edit_manifest(lone, "files", value={n: h for n, h in read_manifest(lone)["files"].items() if n not in surplus})
    edit_manifest(lone, "drafts", value={})
    edit_manifest(lone, "defaults", "draft", value="self")
    edit_manifest(lone, "name", value="lone")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def first(place):
    """The first build of the bundle, as a process that has ended."""
    return build_in_process(place)


def build_in_process(place, *arguments):
    """Runs a build with the cache beside the bundle, in a process of its own."""
    script = "from specdec_rt.cli import main; main()"
    options = ("build", "lone", "--recipe", "recipe.toml", "--cache", "cache", *arguments)
    return subprocess.run(
        [sys.executable, "-c", script, *options], cwd=place, capture_output=True, text=True, check=True
    )


@pytest.fixture
def run(place, run, monkeypatch):
    """Runs `build` beside the bundle."""
    monkeypatch.chdir(place)
    return partial(run, "build")


@pytest.fixture
def cache(place, first, tmp_path):  # noqa: ARG001  # it fills the cache
    """A copy of the cache with all engines of the bundle."""
    return EngineCache(Path(shutil.copytree(place / "cache", tmp_path / "cache")))


@pytest.fixture
def builder(place, cache):
    return EngineBuilder.open(load_bundle(place / "lone"), read_recipe(place / "recipe.toml"), cache)


def slot(bundle, label):
    return next(slot for slot in bundle_graphs(bundle.manifest) if slot.label == label)


def plans(folder):
    return sorted(path.stem for path in folder.glob("*.plan"))


def key(builder, label="target.time_embedding"):
    return engine_key(builder.key_fields(slot(builder.bundle, label)))


# --- building and finding again ----------------------------------------------------------------------


def test_every_graph_is_built_once_and_then_found_in_the_cache(first, place):
    assert [line.split(":")[0] for line in first.stderr.splitlines()] == GRAPHS
    for words in ("lone: engines in", "fp32", "target.denoise_step", " built ", "MB"):
        assert words in first.stdout
    before = os.times()
    second = build_in_process(place, "--json")
    after = os.times()  # the processor's time of the whole process: the clock's depends on who else is at work
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    assert (second.stderr, second.stdout.count("\n")) == ("", 1)
    record = json.loads(second.stdout)
    assert (record["bundle"], record["cache"], record["cleared"]) == ("lone", "cache", 0)
    assert [graph["graph"] for graph in record["graphs"]] == GRAPHS
    assert all(graph["cached"] for graph in record["graphs"])
    assert plans(place / "cache") == sorted(graph["key"] for graph in record["graphs"])


def test_an_engine_s_record_says_what_was_built(cache):
    found = {entry.record.graph: entry.record for entry in cache.entries()}
    assert sorted(found) == sorted(GRAPHS)
    record = found["target.denoise_step"]
    assert (record.bundle, record.precision, record.backend) == ("lone", "fp32", "tensorrt-rtx")
    assert record.library == trt.__version__
    assert [binding.name for binding in record.outputs] == ["next_state", "mean"]
    assert record.profiles["state"].max[1] == 16
    assert record.build_seconds > 0


def test_clear_removes_all_engines_and_says_how_many(run, cache):
    code, out, err = run("--clear", "--cache", cache.folder)
    assert (code, out, err) == (0, "", f"removed {len(GRAPHS)} engines from {cache.folder}\n")
    assert plans(cache.folder) == []


# --- what a key depends on ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (RECIPE + "# a comment\n", False),
        (RECIPE.replace("level = 0", "level = 1"), True),
        (RECIPE.replace("[1]", "[1, 2]"), True),
        (RECIPE + "draft_length = 3\n", True),
        (RECIPE + "cuda_graphs = false\n", True),
        (RECIPE + 'compute_capabilities = ["8.9"]\n', True),
        (RECIPE + "workspace_mib = 64\n", True),
        (RECIPE + "[profiles.denoise_step]\nstep = { min = [1], opt = [1], max = [2] }\n", False),
        (RECIPE + "[profiles.time_embedding]\ntimestep = { min = [23], opt = [23], max = [23] }\n", True),
    ],
)
def test_a_recipe_that_makes_another_engine_has_another_key(builder, tmp_path, text, changed):
    (tmp_path / "other.toml").write_text(text)
    other = dataclasses.replace(builder, recipe=read_recipe(tmp_path / "other.toml"))
    assert (key(other) != key(builder)) == changed


def test_another_library_version_has_another_key(builder):
    other = dataclasses.replace(builder.tensorrt, version="9.9")
    assert key(dataclasses.replace(builder, tensorrt=other)) != key(builder)


def test_another_gpu_or_driver_has_another_key(builder):
    gpus = [Gpu("A", "8.9", 1, "580"), Gpu("B", "8.9", 1, "580"), Gpu("A", "9.0", 1, "580"), Gpu("A", "8.9", 1, "590")]
    assert len({key(dataclasses.replace(builder, gpu=one)) for one in [None, *gpus]}) == 5


def test_a_changed_graph_is_built_anew_and_the_others_are_found(run, place, cache, tmp_path):
    folder = Path(shutil.copytree(place / "lone", tmp_path / "lone"))
    name = "target.time_embedding.onnx"
    model = onnx.load(folder / name, load_external_data=False)
    model.doc_string = "changed"
    onnx.save(model, folder / name)
    files = read_manifest(folder)["files"]
    edit_manifest(folder, "files", value={**files, name: file_sha256(folder / name)})
    _, out, _ = run(folder, "--recipe", "recipe.toml", "--cache", cache.folder, "--json")
    built = {graph["graph"]: not graph["cached"] for graph in json.loads(out)["graphs"]}
    assert built == {graph: graph == "target.time_embedding" for graph in GRAPHS}


def test_changed_weights_give_another_key(builder):
    bundle = builder.bundle
    files = {**bundle.manifest.files, "target.safetensors": "0" * 64}
    other = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))
    for label in GRAPHS:
        assert key(dataclasses.replace(builder, bundle=other), label) != key(builder, label)


def test_an_engine_of_another_driver_is_built_anew_with_a_warning(builder, caplog):
    here = slot(builder.bundle, "target.time_embedding")
    old, new = (dataclasses.replace(builder, gpu=Gpu("A", "8.9", 1, driver)) for driver in ("580", "590"))
    old.engine(here)
    assert "the engine in the cache is for gpu none, here A (compute capability 8.9), driver none" in caplog.text
    assert not new.engine(here)[1].cached
    assert "the engine in the cache is for driver 580, here 590; it is built anew" in caplog.text
    assert old.engine(here)[1].cached
    assert builder.engine(here)[1].cached


# --- trust -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["tampered", "truncated", "altered record", "no record", "another machine's"])
def test_an_engine_that_this_machine_did_not_build_is_built_anew(builder, cache, caplog, monkeypatch, tmp_path, damage):
    """Nothing is deserialised on the way: TensorRT's runtime raises in all these tests."""
    plan = cache.folder / f"{key(builder)}.plan"
    record = plan.with_suffix(".json")
    content = bytearray(plan.read_bytes())
    if damage == "tampered":
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
    elif damage == "truncated":
        plan.write_bytes(content[:-100])
    elif damage == "altered record":
        record.write_text(record.read_text().replace('"precision": "fp32"', '"precision": "bf16"', 1))
    elif damage == "no record":
        record.unlink()
    else:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
        cache = EngineCache(cache.folder)
    refused = plan.read_bytes() if damage in ("tampered", "truncated") else None
    again = EngineBuilder.open(builder.bundle, builder.recipe, cache)
    given, _ = again.engine(slot(builder.bundle, "target.time_embedding"))
    assert given != refused
    assert f"the engine {plan} is not used" in caplog.text
    assert given == plan.read_bytes() == cache.read(plan.stem)
    assert json.loads(record.read_text())["record"]["plan_sha256"] == hashlib.sha256(given).hexdigest()


# --- interrupts and concurrent builds ----------------------------------------------------------------

SCRIPT = (
    "import signal\n"
    # As on a terminal, also where the tests run in the background of a shell, which ignores interrupts there.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from specdec_rt.cli import main; main()"
)


def start(place, folder):
    """A build into the cache `folder`, as a process that is under way."""
    options = ("build", "lone", "--recipe", "recipe.toml", "--cache", str(folder))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *options],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_building(process, folder):
    """Until the process has taken the lock under which it builds engines into `folder`."""
    while not (folder / ".build.lock").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_an_interrupt_leaves_no_partial_engine_and_no_lock(run, place, tmp_path):
    folder = tmp_path / "new"
    with start(place, folder) as process:
        wait_until_building(process, folder)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] == []
    with EngineCache(folder).building(lambda: pytest.fail("a lock was left")):
        pass
    assert run("lone", "--recipe", "recipe.toml", "--cache", folder)[0] == 0
    assert len(plans(folder)) == len(GRAPHS)


def test_two_builds_at_once_leave_one_intact_engine_of_each_graph(place, tmp_path):
    folder = tmp_path / "new"
    processes = [start(place, folder), start(place, folder)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(err.count(": built in") for _, err in said) == len(GRAPHS)
    assert any("another process is building into the cache" in err for _, err in said)
    cache = EngineCache(folder)
    assert sorted(entry.record.graph for entry in cache.entries()) == sorted(GRAPHS)
    assert all(cache.read(name) is not None for name in plans(folder))
    assert len(list(folder.iterdir())) == len(GRAPHS) * 2 + 2


# --- refusals ----------------------------------------------------------------------------------------


def test_build_without_a_recipe_is_refused(run):
    code, out, err = run("lone")
    assert (code, out) == (2, "")
    assert "error: no recipe was given; expected --recipe FILE.toml" in err


def test_a_recipe_for_a_backend_without_engines_is_refused(run, tmp_path):
    (tmp_path / "cpu.toml").write_text('backend = "onnxruntime"\n')
    code, _, err = run("lone", "--recipe", tmp_path / "cpu.toml", "--cache", tmp_path / "cache")
    assert code == 2
    assert "is for backend 'onnxruntime', which runs the bundle's graphs as they are: there is nothing to build" in err
    assert not (tmp_path / "cache").exists()


def test_a_recipe_that_does_not_fit_the_bundle_builds_nothing(builder, tmp_path):
    text = RECIPE + "[profiles.path_means]\nguidance = { min = [1], opt = [1], max = [1] }\n"
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"wrong\.toml: profiles\.path_means\.guidance has 1 sizes"):
        build_bundle(builder.bundle, read_recipe(tmp_path / "wrong.toml"), EngineCache(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(find_gpu() is not None, reason="for machines without a GPU")
def test_tensorrt_builds_only_where_there_is_a_gpu(place, cache, monkeypatch):
    # `tensorrt` itself cannot be installed without a GPU to use it on. TensorRT-RTX stands in for the module, without
    # the one ability that tensorrt lacks: to build for GPUs that are not there.
    stand_in = ModuleType("tensorrt")
    vars(stand_in).update({name: value for name, value in vars(trt).items() if name != "ComputeCapability"})
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    with pytest.raises(BackendError, match="driver"):
        EngineBuilder.open(load_bundle(place / "lone"), default_recipe("tensorrt"), cache)


# --- on a terminal -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stand-in for a terminal, which a test run has none of."""

    def isatty(self):
        return True


def test_bars_on_a_terminal_name_the_graph_and_its_phase():
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=100)
    with build_reporter(2, console) as reporter:
        reporter.waiting("target.backbone")
        assert_shown(screen, "target.backbone (waiting for another process)")
        reporter.building("target.backbone")
        assert reporter.step("Optimizing graph", 3, 30)
        assert_shown(screen, "target.backbone: Optimizing graph")
        reporter.finished(BuiltGraph("target.backbone", "fp16", False, 1.0, 100, "key"))
        assert_shown(screen, "engines")


def assert_shown(screen, words, seconds=5.0):
    """Wait until the bars, which are redrawn ten times a second, show the words."""
    end = time.monotonic() + seconds
    while words not in screen.getvalue():
        assert time.monotonic() < end, screen.getvalue()
        time.sleep(0.02)


def test_a_log_file_has_a_line_for_each_engine_that_is_built_and_none_for_those_found():
    log = io.StringIO()
    with build_reporter(2, Console(file=log, width=40)) as reporter:
        reporter.building("target.backbone")
        assert reporter.step("Optimizing graph", 3, 30)
        reporter.finished(BuiltGraph("target.backbone", "fp16", False, 1.0, 2_000_000, "key"))
        reporter.finished(BuiltGraph("target.modulation", "fp16", True, 0.1, 2_000_000, "key"))
    assert log.getvalue() == "target.backbone: built in 1.0 s, fp16, 2.0 MB\n"
