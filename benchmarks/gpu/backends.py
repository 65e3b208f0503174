"""The backends that are measured: every one that works here, and PyTorch, each eager and captured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu.torch_device import TorchBackend, TorchDevice
from specdec_rt.backend_choice import open_backend
from specdec_rt.backends.availability import AUTO_ORDER, check
from specdec_rt.backends.base import Backend, BackendName
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import PrecisionTable, Recipe, default_recipe
from specdec_rt.bundle import Bundle
from specdec_rt.manifest import Precision

__all__ = ["PYTORCH", "Candidate", "Kind", "candidates", "recipe_for", "working_backends"]

Kind = Literal["cuda", "cpu"]
PYTORCH = "pytorch"


def working_backends(device: Kind) -> list[str]:
    """The runtime's own backends that work on such a device here, the best first."""
    gpu = [name for name in AUTO_ORDER if name is not BackendName.ONNXRUNTIME]
    return [name.value for name in (gpu if device == "cuda" else [BackendName.ONNXRUNTIME]) if check(name).usable]


def recipe_for(backend: str, batches: Sequence[int], precision: Precision) -> Recipe:
    """The backend's default recipe, changed to these batch sizes and this precision."""
    # Training steps up to 999 need single precision, and a chain is embedded only once.
    table = PrecisionTable(default=precision, time_embedding="fp32")
    return default_recipe(backend).model_copy(update={"batch_buckets": tuple(sorted(set(batches))), "precision": table})


@dataclass(frozen=True)
class Candidate:
    """A backend in one of its forms, yet to be opened."""

    backend: str
    captured: bool
    precision: Precision
    batches: tuple[int, ...]
    device: Kind
    cache: Path
    """the folder that engines are kept in"""

    def open(self, bundle: Bundle) -> Backend:
        """Open the backend. Raises whatever keeps it from working."""
        if self.backend == PYTORCH:
            device = TorchDevice(self.device, batch_buckets=sorted(self.batches), graphs=self.captured)
            return TorchBackend.open(bundle, device, self.precision)
        recipe = recipe_for(self.backend, self.batches, self.precision)
        return open_backend(bundle, recipe=recipe, cache=EngineCache(self.cache), cuda_graph=self.captured)

    @property
    def record(self) -> dict[str, object]:
        """What its rows say of it. ONNX Runtime captures each call of an engine, the others a whole launch."""
        unit = "call" if self.backend == BackendName.CUDA else "launch"
        graphs = f"a graph per {unit}" if self.captured else "none"
        return {"backend": self.backend, "captured": self.captured, "graphs": graphs, "precision": self.precision}


def candidates(
    device: Kind,
    batches: Sequence[int],
    precisions: Sequence[Precision],
    cache: Path,
    *,
    pytorch: bool = True,
) -> Iterator[Candidate]:
    """All that is to be measured, captured before eager. On a CPU nothing is captured."""
    names = [*working_backends(device), *([PYTORCH] if pytorch else [])]
    forms = (True, False) if device == "cuda" else (False,)
    for precision in precisions:
        for captured in forms:
            for name in names:
                yield Candidate(name, captured, precision, tuple(batches), device, cache)
