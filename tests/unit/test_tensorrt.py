"""The wrapper over TensorRT's modules: the names it uses, what it builds, what it refuses."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from specdec_rt.backends import tensorrt_builder, tensorrt_engine, tensorrt_module, tensorrt_progress
from specdec_rt.backends.nvidia_driver import find_gpu
from specdec_rt.backends.tensorrt_builder import BuildSettings, ShapeProfile, build_engine, configure
from specdec_rt.backends.tensorrt_engine import load_engine
from specdec_rt.backends.tensorrt_module import REQUIRED_NAMES, capabilities_of, has_name, probe
from specdec_rt.bundle import load_bundle
from specdec_rt.errors import BackendError

GOLDEN = Path(__file__).parents[1] / "golden" / "tensorrt_names.json"
SETTINGS = BuildSettings(builder_level=0)
STEPS = {"timestep": ShapeProfile((1,), (46,), (50,))}


@pytest.fixture(scope="module")
def tensorrt():
    pytest.importorskip("tensorrt_rtx")
    return probe("tensorrt-rtx")


@pytest.fixture(scope="module")
def time_embedding():
    bundle = load_bundle("digits")
    return bundle.path(bundle.manifest.target.graphs["time_embedding"])


def save_attention(path, dtype=TensorProto.FLOAT, op="Attention"):
    """A graph of one attention node; returns its profiles."""
    inputs = [helper.make_tensor_value_info(name, dtype, ["B", 2, "S", 16]) for name in ("q", "k", "v")]
    output = helper.make_tensor_value_info("y", dtype, ["B", 2, "S", 16])
    graph = helper.make_graph([helper.make_node(op, ["q", "k", "v"], ["y"], name="attend")], "graph", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return {name: ShapeProfile((1, 2, 1, 16), (2, 2, 8, 16), (2, 2, 16, 16)) for name in ("q", "k", "v")}


# --- names -------------------------------------------------------------------------------------------

ROLES = {
    "trt": "",
    "attention": "IAttention",
    "boundary": "IAttentionInputLayer",
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "tensor": "ITensor",
}
"""What the sources call TensorRT's objects, with an underscore before it or none, and their classes."""

SOURCES = (tensorrt_module, tensorrt_builder, tensorrt_progress, tensorrt_engine)

GUARDED = {
    "attention": {
        "IAttention.decomposable",
        "IAttentionInputLayer",
        "IAttentionInputLayer.attention",
        "LayerType.ATTENTION_INPUT",
    },
    "compute_capabilities": {
        "ComputeCapability",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
    },
    "runtime_cache": {
        "DynamicShapesKernelSpecializationStrategy",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    },
    "user_allocation": {"BuilderFlag.REQUIRE_USER_ALLOCATION"},
}
"""Names that are used only where the capability of that name was found."""


def published(version):
    """The names of a module, as "class.name"."""
    classes = {owner: names.split() for owner, names in json.loads(GOLDEN.read_text())[version]["names"].items()}
    return {f"{owner}.{name}" if owner else name for owner, names in classes.items() for name in names}


def used_names():
    """What the sources say of TensorRT's objects, as "class.name"."""
    found = set()
    for node in (node for source in SOURCES for node in ast.walk(ast.parse(Path(source.__file__).read_text()))):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        root, *parts = [node.id if isinstance(node, ast.Name) else "", *parts]
        if root == "self" and parts:
            root, *parts = parts
        role = ROLES.get(root.removeprefix("_"))
        if role is not None and parts and not parts[-1].startswith("__"):
            dotted = [role, *parts] if role else parts
            found |= {".".join(dotted[: count + 1]) for count in range(bool(role), len(dotted))}
    return found


def standing(names):
    """A module that has these names and nothing else."""
    root = SimpleNamespace()
    for dotted in sorted(names):
        place, parts = root, dotted.split(".")
        for part in parts[:-1]:
            place = vars(place).setdefault(part, SimpleNamespace())
        vars(place).setdefault(parts[-1], SimpleNamespace())
    return root


def test_the_walk_finds_the_names():
    names = used_names()
    assert len(names) > 25
    assert {"Builder", "Builder.create_network", "IBuilderConfig.set_flag", "ILogger.Severity.ERROR"} <= names


@pytest.mark.parametrize("version", ["10.13", "11.4"])
def test_every_name_is_in_the_published_bindings(version):
    names = published(version)
    capabilities = capabilities_of(standing(names))
    guarded = set().union(*(group for name, group in GUARDED.items() if not getattr(capabilities, name)))
    assert used_names() - names == guarded & used_names()
    assert set(REQUIRED_NAMES) <= names


def test_every_name_is_in_tensorrt_rtx(tensorrt):
    names = used_names() | set(REQUIRED_NAMES)
    assert {name for name in names if not has_name(tensorrt.module, name)} == set()


def test_guards_stand_for_names_that_are_used():
    assert set().union(*GUARDED.values()) <= used_names()


def test_what_tensorrt_10_and_11_can_do():
    ten, eleven = (capabilities_of(standing(published(version))) for version in ("10.13", "11.4"))
    assert (ten.strongly_typed_only, eleven.strongly_typed_only) == (False, True)
    assert (ten.attention, eleven.attention) == (False, True)
    for found in (ten, eleven):
        assert found.timing_cache
        assert found.editable_timing_cache
        assert found.progress_monitor
        assert (found.user_allocation, found.runtime_cache, found.compute_capabilities) == (False, False, ())


# --- probing -----------------------------------------------------------------------------------------


def test_what_tensorrt_rtx_can_do(tensorrt):
    found = tensorrt.capabilities
    assert tensorrt.title == f"TensorRT-RTX {tensorrt.version}"
    assert found.strongly_typed_only
    assert found.user_allocation
    assert found.runtime_cache
    assert found.attention
    assert not found.timing_cache
    assert {"SM75", "SM89", "SM120"} <= set(found.compute_capabilities)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r'TensorRT is not installed: pip install "specdec-rt\[tensorrt\]"'),
        ("import no_such_module", "TensorRT is installed but misses no_such_module; install it again"),
        ("raise OSError('libnvinfer.so.10: cannot open')", r"cannot be imported \(libnvinfer.so.10: cannot open\)"),
        ("__version__ = '8.4'", "TensorRT 8.4 is too old, it has no NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
    ],
)
def test_a_module_that_cannot_be_used(monkeypatch, tmp_path, content, said):
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    if content is None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)  # what an import of a missing module meets
    else:
        (tmp_path / "tensorrt.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=said):
        probe("tensorrt")
    if isinstance(sys.modules.get("tensorrt"), ModuleType):
        del sys.modules["tensorrt"]


def test_importing_the_wrapper_imports_no_library():
    script = (
        "import sys, specdec_rt.backends.tensorrt_engine, specdec_rt.build.builder\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('tensorrt', 'tensorrt_rtx', 'cuda')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- building ----------------------------------------------------------------------------------------


def test_a_plan_and_its_progress(tensorrt, time_embedding):
    seen = []

    def progress(phase, done, total):
        seen.append((phase, done, total))
        return True

    plan = build_engine(tensorrt, time_embedding, STEPS, settings=SETTINGS, progress=progress)
    assert plan.plan[1:4] == b"trt"
    assert plan.timing_cache is None
    assert len({phase for phase, _, _ in seen}) > 3
    assert all(0 <= done <= total for _, done, total in seen)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_attention_builds_in_every_type(tensorrt, tmp_path, dtype):
    profiles = save_attention(tmp_path / "graph.onnx", dtype)
    assert build_engine(tensorrt, tmp_path / "graph.onnx", profiles, settings=SETTINGS).plan


def test_what_tensorrt_cannot_build_is_told_in_its_words(tensorrt, tmp_path, capfd):
    profiles = save_attention(tmp_path / "graph.onnx")
    unmarked = replace(tensorrt, capabilities=replace(tensorrt.capabilities, attention=False))
    with pytest.raises(BackendError, match=r"cannot build .*graph\.onnx: .*Attention operation was not supported"):
        build_engine(unmarked, tmp_path / "graph.onnx", profiles, settings=SETTINGS)
    capfd.readouterr()  # TensorRT prints it, too


def test_too_little_scratch_memory_names_the_recipes_key(tensorrt, capfd):
    bundle = load_bundle("digits")
    path = bundle.path(bundle.manifest.target.graphs["path_means"])
    sizes = {"G": 2, "R": 2**14, "n": 23, "n_plus_1": 24}
    profiles = {
        binding.name: ShapeProfile(*3 * (tuple(sizes.get(size, size) for size in binding.shape),))
        for binding in bundle.manifest.target.graphs["path_means"].inputs
        if any(isinstance(size, str) for size in binding.shape)
    }
    with pytest.raises(BackendError, match=r"may have 1 MiB: raise workspace_mib in the recipe, or build for smaller"):
        build_engine(tensorrt, path, profiles, settings=BuildSettings(workspace_bytes=2**20))
    capfd.readouterr()


def test_a_node_that_cannot_be_read_is_named(tensorrt, tmp_path):
    profiles = save_attention(tmp_path / "graph.onnx", op="Nonsense")
    with pytest.raises(BackendError, match=r"cannot read .*graph\.onnx: node 'attend' \(Nonsense\): .*not found"):
        build_engine(tensorrt, tmp_path / "graph.onnx", profiles, settings=SETTINGS)
    with pytest.raises(BackendError, match=r"cannot read .*missing\.onnx: .*cannot be found"):
        build_engine(tensorrt, tmp_path / "missing.onnx", profiles, settings=SETTINGS)


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ({}, r"needs profiles of \['timestep'\].*got \[\]"),
        ({**STEPS, "other": STEPS["timestep"]}, r"got \['other', 'timestep'\]"),
        ({"timestep": ShapeProfile((1, 1), (1, 1), (1, 1))}, r"\(1, 1\) to \(1, 1\).*does not fit its shape \(-1,\)"),
        ({"timestep": ShapeProfile((5,), (4,), (6,))}, "does not fit its shape"),
    ],
)
def test_profiles_that_do_not_fit(tensorrt, time_embedding, profiles, said):
    with pytest.raises(BackendError, match=said):
        build_engine(tensorrt, time_embedding, profiles, settings=SETTINGS)


def test_compute_capabilities(tensorrt, time_embedding):
    assert build_engine(
        tensorrt, time_embedding, STEPS, settings=BuildSettings(compute_capabilities=["8.9", "12.0"])
    ).plan
    with pytest.raises(BackendError, match=r"no engine ahead for compute capability 5\.0; expected some of 7\.5, 8\.0"):
        build_engine(tensorrt, time_embedding, STEPS, settings=BuildSettings(compute_capabilities=["8.9", "5.0"]))


def test_progress_cancels(tensorrt, time_embedding):
    seen = []
    with pytest.raises(BackendError, match="was cancelled"):
        build_engine(
            tensorrt, time_embedding, STEPS, settings=SETTINGS, progress=lambda *_: seen.append(1) or len(seen) < 5
        )
    assert len(seen) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_what_progress_raises_ends_the_build_and_comes_out(tensorrt, time_embedding, error):
    def fail(*_):
        raise error

    with pytest.raises(type(error)) as caught:
        build_engine(tensorrt, time_embedding, STEPS, settings=SETTINGS, progress=fail)
    assert caught.value is error


def test_a_timing_cache_is_used_and_returned(tensorrt, time_embedding):
    """TensorRT-RTX has the functions; they do nothing and say so."""
    timing = replace(tensorrt, capabilities=replace(tensorrt.capabilities, timing_cache=True))
    with pytest.warns(DeprecationWarning, match="no-ops"):
        made = build_engine(timing, time_embedding, STEPS, settings=BuildSettings(timing_cache=b""))
    assert made.timing_cache is not None


@pytest.mark.skipif(find_gpu() is not None, reason="for machines without a GPU")
def test_without_a_driver_engines_are_not_loaded(tensorrt, time_embedding):
    plan = build_engine(tensorrt, time_embedding, STEPS, settings=SETTINGS).plan
    with pytest.raises(BackendError, match=r"cannot load an engine: .*driver.*specdec-rt doctor"):
        load_engine(tensorrt, plan)


def test_builds_leave_out_tf32(tensorrt):
    """It does not show on a machine without a GPU: seen where the module is told."""
    trt = tensorrt.module
    config = trt.Builder(tensorrt.logger).create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32)
    configure(tensorrt, config, BuildSettings())
    assert not config.get_flag(trt.BuilderFlag.TF32)


def test_plans_run_no_host_code(tensorrt):
    """A runtime takes TensorRT's place: without a GPU the real one loads nothing."""

    class Runtime:
        engine_host_code_allowed = True

        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, plan):
            return plan, self.engine_host_code_allowed

    module = ModuleType("trt")
    module.Runtime, module.ILogger = Runtime, tensorrt.module.ILogger
    assert load_engine(replace(tensorrt, module=module), b"plan") == (b"plan", False)
