"""Which backends can run on this machine, and of the others why not and how to mend it.

Nothing is imported before it is asked for; a machine without driver or libraries gets reasons, not exceptions.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from specdec_rt.backends.installed import (
    INSTALL_ONNXRUNTIME_GPU,
    installed_version,
    onnxruntime_problem,
    preload_libraries,
)
from specdec_rt.backends.tensorrt import TensorRTModule, probe
from specdec_rt.errors import BackendError, UsageError

__all__ = ["AUTO_ORDER", "Availability", "Driver", "Gpu", "check", "driver", "gpu"]

AUTO_ORDER = ("tensorrt-rtx", "tensorrt", "cuda", "onnxruntime")
"""All backends, the best first."""

PROVIDER = "CUDAExecutionProvider"
IDENTITY = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a001011"
)
"""The smallest ONNX model, y = x: a session of it shows whether a provider's libraries load."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here."""

    backend: str
    usable: bool
    why: str
    """what it runs on; or why it cannot run, and how to mend that"""
    version: str | None
    """of its library; None where that is not installed"""


@dataclass(frozen=True)
class Gpu:
    """A GPU, and the driver that runs it."""

    name: str
    compute_capability: str
    """as in "9.0" """
    memory_bytes: int
    driver_version: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver."""

    version: str
    cuda: tuple[int, int]
    """the newest CUDA that it runs, as in (13, 0)"""
    gpus: tuple[Gpu, ...]
    """at least one; backends use the first"""


def check(backend: str) -> Availability:
    """Whether `backend` can run here. Raises UsageError for a name that is none."""
    if backend not in AUTO_ORDER:
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(AUTO_ORDER)}")
    try:
        return Availability(backend, True, _CHECKS[backend](), _version(backend))
    except BackendError as error:
        return Availability(backend, False, str(error), _version(backend))


def gpu() -> Gpu | None:
    """The GPU that backends use, the driver's first; None where there is no driver or no device."""
    try:
        return driver().gpus[0]
    except BackendError:
        return None


def driver() -> Driver:
    """The driver and its GPUs. Makes no context on them. Raises BackendError where there is none, saying why."""
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        raise BackendError(
            f"cuda-bindings, which asks the driver, cannot be imported ({error}): pip install 'specdec-rt[cuda]'"
        ) from error
    try:
        status = api.cuInit(0)[0]
    except RuntimeError as error:  # what the loader of libcuda raises is a kind of it
        raise BackendError(
            "no NVIDIA driver is installed here, or it cannot be seen: install it (nvidia-smi lists the GPUs once it "
            "works), start a container with its GPUs (docker run --gpus all), or take backend onnxruntime"
        ) from error
    if status != api.CUresult.CUDA_SUCCESS:
        raise BackendError(
            f"NVIDIA's driver cannot be used ({status.name}): see that nvidia-smi lists a GPU and that "
            "CUDA_VISIBLE_DEVICES hides none; after an update of the driver restart the machine"
        )
    cuda = divmod(_ask(api.cuDriverGetVersion()), 1000)
    version = _driver_version() or f"CUDA {cuda[0]}.{cuda[1] // 10}"
    count = _ask(api.cuDeviceGetCount())
    if count == 0:
        raise BackendError(
            "NVIDIA's driver shows no GPU: see that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES hides none"
        )
    gpus = tuple(_gpu(api, ordinal, version) for ordinal in range(count))
    return Driver(version, (cuda[0], cuda[1] // 10), gpus)


def _gpu(api: Any, ordinal: int, driver_version: str) -> Gpu:  # noqa: ANN401  # a module
    device = _ask(api.cuDeviceGet(ordinal))
    attributes = api.CUdevice_attribute
    major, minor = (
        _ask(api.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = _ask(api.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
    return Gpu(name, f"{major}.{minor}", _ask(api.cuDeviceTotalMem(device)), driver_version)


def _ask(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401  # whatever the driver was asked for
    """The value of a driver call's `(status, value)`."""
    status, value = answer
    if int(status) != 0:
        raise BackendError(f"NVIDIA's driver failed ({status.name}): see what nvidia-smi says")
    return value


def _driver_version() -> str | None:
    """The driver's own version, which only its management library knows; None where that is missing (Jetson)."""
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        try:
            return str(nvml.system_get_driver_version())
        finally:
            nvml.shutdown()
    except Exception:  # not there, too old, or without permission: nothing depends on it
        return None


def _version(backend: str) -> str | None:
    if backend == "cuda":
        return installed_version("onnxruntime-gpu")
    if backend == "onnxruntime":
        return installed_version("onnxruntime", "onnxruntime-gpu")
    return installed_version(*_packages(backend))


def _packages(backend: str) -> tuple[str, ...]:
    """Names under which a TensorRT is packaged: the module's for the newest CUDA, or of one CUDA."""
    return tuple(f"{backend}{suffix}" for suffix in ("-cu13", "-cu12", ""))


def _check_onnxruntime() -> str:
    if "CPUExecutionProvider" not in _onnxruntime().get_available_providers():
        raise BackendError(onnxruntime_problem() or "this build of ONNX Runtime has no CPU provider")
    return "runs on the CPU"


def _check_cuda() -> str:
    found = _device("cuda")
    onnxruntime = _onnxruntime()
    if PROVIDER not in onnxruntime.get_available_providers():
        raise BackendError(
            onnxruntime_problem() or f"onnxruntime is installed for the CPU alone: {INSTALL_ONNXRUNTIME_GPU}"
        )
    built_for = str(getattr(onnxruntime, "cuda_version", None) or "0")
    _require_cuda(found, int(built_for.split(".")[0]), "onnxruntime-gpu")
    if not _provider_loads(onnxruntime):
        raise BackendError(
            f"ONNX Runtime's CUDA provider cannot be loaded: it needs the libraries of CUDA {built_for} and cuDNN 9: "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return _runs_on(found.gpus[0])


def _onnxruntime() -> Any:  # noqa: ANN401  # a module without types
    try:
        import onnxruntime

        onnxruntime.get_available_providers  # noqa: B018  # of a broken mix only an empty folder may be left
    except (ImportError, AttributeError) as error:
        problem = onnxruntime_problem() or f"onnxruntime cannot be imported ({error}): pip install onnxruntime"
        raise BackendError(problem) from error
    return onnxruntime


def _provider_loads(onnxruntime: Any) -> bool:  # noqa: ANN401  # a module without types
    """Whether a session gets the CUDA provider; ONNX Runtime itself only logs that, and goes on on the CPU."""
    preload_libraries(onnxruntime)
    onnxruntime.set_default_logger_severity(4)
    try:
        return PROVIDER in onnxruntime.InferenceSession(IDENTITY, providers=[PROVIDER]).get_providers()
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default


def _check_tensorrt_rtx() -> str:
    found = _device("tensorrt-rtx")
    targets = _flavour("tensorrt-rtx", found).capabilities.compute_capabilities
    device = found.gpus[0]
    if f"SM{device.compute_capability.replace('.', '')}" not in targets:
        raise BackendError(
            f"TensorRT-RTX {_version('tensorrt-rtx')} makes no engines for compute capability "
            f"{device.compute_capability} ({device.name}), only for {', '.join(targets)}: take backend tensorrt or cuda"
        )
    return _runs_on(device)


def _check_tensorrt() -> str:
    found = _device("tensorrt")
    _flavour("tensorrt", found)
    return _runs_on(found.gpus[0])


def _flavour(backend: str, found: Driver) -> TensorRTModule:
    flavour = probe(backend)
    for major in (13, 12):
        if installed_version(f"{backend}-cu{major}") is not None:
            _require_cuda(found, major, flavour.title)
            break
    return flavour


def _device(backend: str) -> Driver:
    """The driver, for a backend that also needs cuda-core."""
    found = driver()
    if "cuda.core" not in sys.modules and find_spec("cuda.core") is None:
        raise BackendError(f"cuda-core is not installed: pip install 'specdec-rt[{backend}]'")
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        load_nvidia_dynamic_lib("nvrtc")
    except Exception as error:  # its errors have types of their own
        raise BackendError(
            f"NVRTC, which compiles kernels, cannot be loaded ({error}): pip install 'specdec-rt[{backend}]'"
        ) from error
    return found


def _require_cuda(found: Driver, major: int, library: str) -> None:
    if found.cuda[0] < major:
        raise BackendError(
            f"{library} is built for CUDA {major}, driver {found.version} runs CUDA {found.cuda[0]}.{found.cuda[1]} "
            "at most: update the driver"
        )


def _runs_on(device: Gpu) -> str:
    return f"runs on {device.name} (compute capability {device.compute_capability})"


_CHECKS: dict[str, Callable[[], str]] = {
    "tensorrt-rtx": _check_tensorrt_rtx,
    "tensorrt": _check_tensorrt,
    "cuda": _check_cuda,
    "onnxruntime": _check_onnxruntime,
}
