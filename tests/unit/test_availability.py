"""Which backends can run, and what is said of those that cannot."""

import base64
import hashlib
import sys
from types import SimpleNamespace

import pytest

from specdec_rt.backends.availability import check
from specdec_rt.backends.installed import installed_version, onnxruntime_problem
from specdec_rt.backends.nvidia_driver import Driver, Gpu, find_driver, find_gpu
from specdec_rt.errors import BackendError, UsageError

without_gpu = pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
api = pytest.importorskip("cuda.bindings.driver")
nvml = pytest.importorskip("cuda.bindings.nvml")


def driver_of(compute_capability="8.9", cuda=(13, 0)):
    """A driver with a GPU that is not there."""
    return Driver("600.1", cuda, (Gpu("Pretended", compute_capability, 2**33, "600.1"),))


# --- this machine --------------------------------------------------------------------------------------


def test_the_cpu_is_always_there():
    found = check("onnxruntime")
    assert (found.backend, found.usable) == ("onnxruntime", True)
    assert found.version == installed_version("onnxruntime", "onnxruntime-gpu")


@without_gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "cuda"])
def test_a_missing_driver_is_said(backend):
    found = check(backend)
    assert not found.usable
    assert "no NVIDIA driver" in found.why
    assert "install it" in found.why


@without_gpu
def test_there_is_no_gpu():
    assert find_gpu() is None


def test_an_unknown_backend():
    with pytest.raises(UsageError, match=r"backend is 'tpu'; expected one of tensorrt-rtx, .*onnxruntime"):
        check("tpu")


# --- other machines ------------------------------------------------------------------------------------


def test_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert find_gpu() is None
    assert "pip install 'specdec-rt[cuda]'" in check("cuda").why


def test_without_cuda_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)  # what an import of a missing package meets
    why = check("tensorrt", driver_of()).why
    assert why.startswith("cuda-core cannot be imported (")
    assert why.endswith("): pip install 'specdec-rt[tensorrt]'")


def test_without_nvrtc(monkeypatch):
    def missing(name):
        raise RuntimeError(f"{name} is not there")

    monkeypatch.setattr("cuda.pathfinder.load_nvidia_dynamic_lib", missing)  # what looks for NVIDIA's libraries
    why = check("tensorrt", driver_of()).why
    assert why.startswith("NVRTC, which compiles kernels, cannot be loaded (nvrtc is not there): pip install")


def test_a_driver_that_shows_no_gpu(monkeypatch):
    # The driver's own answer, as on a machine whose GPUs are hidden.
    monkeypatch.setattr(api, "cuInit", lambda _: (api.CUresult.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(BackendError, match=r"CUDA_ERROR_NO_DEVICE.*CUDA_VISIBLE_DEVICES"):
        find_driver()


def test_what_the_driver_says(monkeypatch):
    """The driver is replaced; it answers as the bindings have it: a status, then the value."""
    done = api.CUresult.CUDA_SUCCESS
    values = {
        "cuDriverGetVersion": 13020,
        "cuDeviceGetCount": 1,
        "cuDeviceGet": 0,
        "cuDeviceGetAttribute": 9,
        "cuDeviceGetName": b"Great GPU\0\0\0",
        "cuDeviceTotalMem": 2**34,
    }
    monkeypatch.setattr(api, "cuInit", lambda _: (done,))
    for name, value in values.items():
        monkeypatch.setattr(api, name, lambda *_, value=value: (done, value))

    def missing():
        raise RuntimeError("no such library")

    monkeypatch.setattr(nvml, "init_v2", missing)  # as on a Jetson, which has no management library
    found = Gpu("Great GPU", "9.9", 2**34, "CUDA 13.2")
    assert find_driver() == Driver("CUDA 13.2", (13, 2), (found,))
    assert find_gpu() == found


def test_a_gpu_that_tensorrt_rtx_targets():
    pytest.importorskip("tensorrt_rtx")
    found = check("tensorrt-rtx", driver_of("8.9"))
    assert (found.usable, found.why) == (True, "runs on Pretended (compute capability 8.9)")


def test_a_gpu_that_tensorrt_rtx_does_not_target():
    pytest.importorskip("tensorrt_rtx")
    found = check("tensorrt-rtx", driver_of("7.0"))
    assert not found.usable
    assert "no engines for compute capability 7.0 (Pretended), only for SM75" in found.why


@pytest.mark.skipif(installed_version("tensorrt-rtx-cu13") is None, reason="TensorRT-RTX for CUDA 13 is not installed")
def test_a_driver_that_is_too_old():
    why = check("tensorrt-rtx", driver_of(cuda=(12, 8))).why
    assert why.endswith("is built for CUDA 13, driver 600.1 runs CUDA 12.8 at most: update the driver")


@pytest.mark.skipif(installed_version("tensorrt") is not None, reason="TensorRT is installed")
def test_a_gpu_without_the_library():
    assert "TensorRT is not installed" in check("tensorrt", driver_of()).why


@pytest.mark.skipif(installed_version("onnxruntime-gpu") is not None, reason="onnxruntime-gpu is installed")
def test_onnxruntime_for_the_cpu_alone():
    why = check("cuda", driver_of()).why
    assert why.startswith("onnxruntime is installed for the CPU alone: pip uninstall -y onnxruntime onnxruntime-gpu")
    assert why.endswith("pip install 'onnxruntime-gpu[cuda,cudnn]'")


def test_a_provider_whose_libraries_are_missing(monkeypatch):
    """ONNX Runtime says that it has the provider, and then goes on without it."""
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    library = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        cuda_version="13.0",
        preload_dlls=lambda: print("Failed to load libcublas.so.13"),  # noqa: T201  # as it does
        set_default_logger_severity=lambda _: None,
        InferenceSession=lambda *_, **__: session,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", library)  # a build for CUDA, which this machine lacks
    why = check("cuda", driver_of()).why
    assert "CUDA provider cannot be loaded: it needs the libraries of CUDA 13.0 and cuDNN 9" in why


# --- onnxruntime over onnxruntime-gpu ------------------------------------------------------------------


def install(site_packages, name, version, files):
    """As pip does: files, replacing whatever was there, and a record of their hashes and sizes."""
    lines = []
    for path, content in files.items():
        file = site_packages / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        lines.append(f"{path},sha256={digest},{len(content)}")
    folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "RECORD").write_text("\n".join([*lines, f"{folder.name}/RECORD,,", "onnxruntime/x.pyc,,"]))


CPU = {"onnxruntime/__init__.py": b"shared", "onnxruntime/capi/state.so": b"the CPU's"}
CUDA = {**CPU, "onnxruntime/capi/state.so": b"the GPU's, longer", "onnxruntime/capi/cuda.so": b"provider"}


def test_each_alone_is_whole(tmp_path):
    assert onnxruntime_problem(tmp_path) is None
    install(tmp_path / "cpu", "onnxruntime", "1.31.1", CPU)
    install(tmp_path / "gpu", "onnxruntime-gpu", "1.31.1", CUDA)
    assert onnxruntime_problem(tmp_path / "cpu") is None
    assert onnxruntime_problem(tmp_path / "gpu") is None


def test_the_later_overwrites_the_earlier(tmp_path):
    install(tmp_path, "onnxruntime-gpu", "1.31.1", CUDA)
    install(tmp_path, "onnxruntime", "1.32.0", CPU)
    said = onnxruntime_problem(tmp_path)
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed" in said
    assert "0 of onnxruntime 1.32.0's 2, 1 of onnxruntime-gpu 1.31.1's 3 are not its own" in said
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]'" in said


def test_a_file_of_the_same_size_is_told_apart(tmp_path):
    install(tmp_path, "onnxruntime", "1.31.1", CPU)
    (tmp_path / "onnxruntime/__init__.py").write_bytes(b"SHARED")
    assert "1 of its 2 files are missing or altered" in onnxruntime_problem(tmp_path)


def test_uninstalling_one_takes_the_files_of_both(tmp_path):
    install(tmp_path, "onnxruntime-gpu", "1.31.1", CUDA)
    for path in CPU:
        (tmp_path / path).unlink()
    said = onnxruntime_problem(tmp_path)
    assert "onnxruntime-gpu 1.31.1 is damaged: 2 of its 3 files are missing or altered" in said
    assert "once onnxruntime was uninstalled" in said
