"""NVIDIA's driver and the GPUs it shows. Nothing is imported before it is asked for."""

from dataclasses import dataclass
from typing import Any

from specdec_rt.errors import BackendError

__all__ = ["Driver", "Gpu", "find_driver", "find_gpu"]


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
    """the newest CUDA version that it runs, as in (13, 0)"""
    gpus: tuple[Gpu, ...]
    """at least one; backends use the first"""


def find_driver() -> Driver:
    """The driver and its GPUs, on which no context is made. Raises BackendError that says why there is none."""
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        raise BackendError(
            f"cuda-bindings, which asks the driver, cannot be imported ({error}): pip install 'specdec-rt[cuda]'"
        ) from error
    _initialise(api)
    major, rest = divmod(_value(api.cuDriverGetVersion()), 1000)
    cuda = (major, rest // 10)
    version = _driver_version() or f"CUDA {cuda[0]}.{cuda[1]}"
    count = _value(api.cuDeviceGetCount())
    if count == 0:
        raise BackendError(
            "NVIDIA's driver shows no GPU: see that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES hides none"
        )
    return Driver(version, cuda, tuple(_gpu(api, ordinal, version) for ordinal in range(count)))


def find_gpu() -> Gpu | None:
    """The GPU that backends use, the driver's first; None where there is no driver or no GPU."""
    try:
        return find_driver().gpus[0]
    except BackendError:
        return None


def _initialise(api: Any) -> None:  # noqa: ANN401  # a module
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


def _gpu(api: Any, ordinal: int, driver_version: str) -> Gpu:  # noqa: ANN401  # a module
    device = _value(api.cuDeviceGet(ordinal))
    attributes = api.CUdevice_attribute
    major, minor = (
        _value(api.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = _value(api.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
    return Gpu(name, f"{major}.{minor}", _value(api.cuDeviceTotalMem(device)), driver_version)


def _value(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401  # whatever the driver was asked for
    """The value of a driver call, which answers `(status, value)`."""
    status, value = answer
    if int(status) != 0:
        raise BackendError(f"NVIDIA's driver failed ({status.name}): see what nvidia-smi says")
    return value


def _driver_version() -> str | None:
    """The driver's own version; None where its management library, which alone knows it, is missing (Jetson)."""
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        try:
            return str(nvml.system_get_driver_version())
        finally:
            nvml.shutdown()
    except Exception:  # not there, too old, or without permission: nothing depends on it
        return None
