"""Which backends can run on this machine, and of the others why not and how to mend it.

Nothing is imported before it is asked for; a machine without driver or libraries gets reasons, not exceptions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specdec_rt.backends.base import BackendName
from specdec_rt.backends.installed import (
    INSTALL_ONNXRUNTIME_GPU,
    installed_version,
    onnxruntime_problem,
    preload_libraries,
)
from specdec_rt.backends.nvidia_driver import Driver, Gpu, find_driver
from specdec_rt.backends.tensorrt_module import TensorRTModule, probe
from specdec_rt.errors import BackendError, UsageError

__all__ = ["AUTO_ORDER", "Availability", "check"]

AUTO_ORDER = tuple(BackendName)
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

    backend: BackendName
    usable: bool
    why: str
    """what it runs on; or why it cannot run, and how to mend that"""
    version: str | None
    """of its library; None where that is not installed"""


def check(backend: str, driver: Driver | None = None) -> Availability:
    """Whether `backend` can run here, on the GPU of `driver` (None: the driver is asked).

    Raises UsageError where no backend has that name.
    """
    if backend not in AUTO_ORDER:
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(AUTO_ORDER)}")
    name = BackendName(backend)
    version = installed_version(*_packages(name))
    try:
        return Availability(name, True, _CHECKS[name](driver), version)
    except BackendError as error:
        return Availability(name, False, str(error), version)


def _packages(backend: BackendName) -> tuple[str, ...]:
    """Names under which the backend's library is packaged."""
    match backend:
        case BackendName.ONNXRUNTIME:
            return ("onnxruntime", "onnxruntime-gpu")
        case BackendName.CUDA:
            return ("onnxruntime-gpu",)
        case _:  # TensorRT's packages are for one CUDA version, or for the newest
            return tuple(f"{backend}{suffix}" for suffix in ("-cu13", "-cu12", ""))


# --- ONNX Runtime ------------------------------------------------------------------------------------


def _check_onnxruntime(driver: Driver | None) -> str:  # noqa: ARG001  # as the others have it
    if "CPUExecutionProvider" not in _import_onnxruntime().get_available_providers():
        raise BackendError(onnxruntime_problem() or "this build of ONNX Runtime has no CPU provider")
    return "runs on the CPU"


def _check_cuda(driver: Driver | None) -> str:
    found = _driver_with_tools(BackendName.CUDA, driver)
    onnxruntime = _import_onnxruntime()
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


def _import_onnxruntime() -> Any:  # noqa: ANN401  # a module without types
    try:
        import onnxruntime

        onnxruntime.get_available_providers  # noqa: B018  # of a broken mix only an empty folder may be left
    except (ImportError, AttributeError) as error:
        problem = onnxruntime_problem() or f"onnxruntime cannot be imported ({error}): pip install onnxruntime"
        raise BackendError(problem) from error
    return onnxruntime


def _provider_loads(onnxruntime: Any) -> bool:  # noqa: ANN401  # a module without types
    """Whether a session gets the CUDA provider. Where not, ONNX Runtime itself only logs it and uses the CPU."""
    preload_libraries(onnxruntime)
    onnxruntime.set_default_logger_severity(4)
    try:
        return PROVIDER in onnxruntime.InferenceSession(IDENTITY, providers=[PROVIDER]).get_providers()
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default


# --- TensorRT ----------------------------------------------------------------------------------------


def _check_tensorrt_rtx(driver: Driver | None) -> str:
    found = _driver_with_tools(BackendName.TENSORRT_RTX, driver)
    tensorrt = _fitting_tensorrt(BackendName.TENSORRT_RTX, found)
    targets, device = tensorrt.capabilities.compute_capabilities, found.gpus[0]
    if f"SM{device.compute_capability.replace('.', '')}" not in targets:
        raise BackendError(
            f"{tensorrt.title} makes no engines for compute capability {device.compute_capability} ({device.name}), "
            f"only for {', '.join(targets)}: take backend tensorrt or cuda"
        )
    return _runs_on(device)


def _check_tensorrt(driver: Driver | None) -> str:
    found = _driver_with_tools(BackendName.TENSORRT, driver)
    _fitting_tensorrt(BackendName.TENSORRT, found)
    return _runs_on(found.gpus[0])


def _fitting_tensorrt(backend: BackendName, driver: Driver) -> TensorRTModule:
    """The backend's module. Raises BackendError where it is missing or too new for the driver."""
    tensorrt = probe(backend)
    for major in (13, 12):
        if installed_version(f"{backend}-cu{major}") is not None:
            _require_cuda(driver, major, tensorrt.title)
            break
    return tensorrt


# --- what all of a GPU's backends need ---------------------------------------------------------------


def _driver_with_tools(backend: BackendName, driver: Driver | None) -> Driver:
    """The driver, once it is known that cuda-core and the compiler of kernels are there, too."""
    found = driver or find_driver()
    try:
        import cuda.core  # noqa: F401  # only to see whether that works
    except Exception as error:  # a broken installation fails in many ways
        raise BackendError(f"cuda-core cannot be imported ({error}): pip install 'specdec-rt[{backend}]'") from error
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        load_nvidia_dynamic_lib("nvrtc")
    except Exception as error:  # its errors have types of their own
        raise BackendError(
            f"NVRTC, which compiles kernels, cannot be loaded ({error}): pip install 'specdec-rt[{backend}]'"
        ) from error
    return found


def _require_cuda(driver: Driver, major: int, library: str) -> None:
    if driver.cuda[0] < major:
        raise BackendError(
            f"{library} is built for CUDA {major}, driver {driver.version} runs CUDA {driver.cuda[0]}.{driver.cuda[1]} "
            "at most: update the driver"
        )


def _runs_on(device: Gpu) -> str:
    return f"runs on {device.name} (compute capability {device.compute_capability})"


_CHECKS: dict[BackendName, Callable[[Driver | None], str]] = {
    BackendName.TENSORRT_RTX: _check_tensorrt_rtx,
    BackendName.TENSORRT: _check_tensorrt,
    BackendName.CUDA: _check_cuda,
    BackendName.ONNXRUNTIME: _check_onnxruntime,
}
