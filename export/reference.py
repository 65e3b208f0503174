"""The `.npz` file that a MAR reference recorded. Arrays are checked before they are used; `docs/mar.md` lists them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from specdec_rt import SpecDecError
from specdec_rt.config import GuidanceSchedule
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["RecordedSampling", "RecordingError", "Reference"]


class RecordingError(SpecDecError):
    """A reference cannot be replayed; names the array, what was found and what was expected."""

    exit_code = 2


@dataclass(frozen=True)
class RecordedSampling:
    """How the recorded images and chains were sampled: the file's string `meta`."""

    ar_steps: int
    guidance: float
    schedule: GuidanceSchedule
    temperature: float


class Reference(Mapping[str, Array]):
    """The arrays of a recorded file, by name; a missing one raises RecordingError."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                arrays = np.load(file, allow_pickle=False)
                if not isinstance(arrays, Mapping):
                    raise ValueError("it is one array, not a set of named ones")
                self._arrays: dict[str, Array] = dict(arrays)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise RecordingError(f"{path} cannot be read as .npz ({error}); expected a recorded reference") from error

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            raise RecordingError(f"the file has no array {name!r}")
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def floats(self, name: str, *shape: int | None) -> FloatArray:
        """The array in float32. Raises RecordingError unless it holds numbers and is of `shape` (None: any size)."""
        array = self[name]
        fits = array.ndim == len(shape) and all(
            size in (None, found) for size, found in zip(shape, array.shape, strict=True)
        )
        if not fits or array.dtype.kind not in "biuf":
            wanted = ["any" if size is None else size for size in shape]
            raise RecordingError(f"{name} is {array.dtype} {list(array.shape)}; expected numbers {wanted}")
        return np.ascontiguousarray(array, np.float32)

    def whole(self, name: str, *shape: int | None, below: int) -> IntArray:
        """The array in int64. Raises RecordingError unless it is of `shape` and holds whole numbers 0 … `below` - 1."""
        self.floats(name, *shape)
        array = np.asarray(self[name])
        if array.size == 0 or (array != np.floor(array)).any() or array.min() < 0 or array.max() >= below:
            raise RecordingError(f"{name} does not hold whole numbers from 0 to {below - 1}")
        return array.astype(np.int64)

    def sampling(self) -> RecordedSampling:
        """The fields of `meta`. Raises RecordingError where it lacks one."""
        text = " ".join(value.decode() if isinstance(value, bytes) else str(value) for value in np.ravel(self["meta"]))
        fields = dict(re.findall(r"(\w+)=(\S+)", text))
        try:
            schedule = fields["cfg_schedule"]
            if schedule not in ("linear", "constant"):
                raise ValueError(f"cfg_schedule is {schedule!r}")
            return RecordedSampling(
                int(fields["ar_steps"]), float(fields["cfg"]), schedule, float(fields["temperature"])
            )
        except (KeyError, ValueError) as error:
            raise RecordingError(
                f"meta is {text!r} ({error}); expected "
                "'ar_steps=8 cfg=2.9 cfg_schedule=linear temperature=0.95' with values of its own"
            ) from error
