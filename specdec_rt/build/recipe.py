"""A recipe: the TOML file that says how engines are built for one kind of machine."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo

from specdec_rt.backends.base import BackendName
from specdec_rt.build.recipe_errors import KnownNames, explain, listed, syntax_error
from specdec_rt.errors import RecipeError
from specdec_rt.manifest import GraphName, Precision

__all__ = [
    "DECODER",
    "GRAPHS",
    "PrecisionTable",
    "Recipe",
    "RecipeGraph",
    "ShapeRange",
    "default_recipe",
    "read_recipe",
]

RecipeGraph = GraphName | Literal["decoder"]
"""The graphs of a model, and the bundle's decoder."""

DECODER: Literal["decoder"] = "decoder"
GRAPHS: tuple[RecipeGraph, ...] = (*GraphName, DECODER)

_TENSORRT = tuple(name for name in BackendName if name.builds_engines)
_MEANT_FOR: Mapping[str, tuple[BackendName, ...]] = {
    "threads": (BackendName.ONNXRUNTIME,),
    "cuda_graphs": (*_TENSORRT, BackendName.CUDA),
    "builder_level": _TENSORRT,
    "workspace_mib": _TENSORRT,
    "timing_cache": (BackendName.TENSORRT,),  # TensorRT-RTX times nothing while it builds
    "compute_capabilities": (BackendName.TENSORRT_RTX,),
    "profiles": _TENSORRT,
}
"""Backends that a key has an effect on; a key that is not here has one on all."""

_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Bucket = Annotated[int, Field(ge=1, le=4096)]
_Capability = Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")]


@dataclass(frozen=True)
class _Origin:
    """Where a recipe was read from. Two recipes that say the same are equal wherever they stand."""

    path: Path | None = field(default=None, compare=False)

    def error(self, said: str) -> RecipeError:
        """An error that names the file, where there is one, and what is wrong in it."""
        return RecipeError(f"{self.path or 'recipe'}: {said}")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PrecisionTable(_Table):
    """In which precision graphs compute."""

    default: Precision = "fp32"
    """of every graph that the table does not name"""
    backbone: Precision | None = None
    time_embedding: Precision | None = None
    modulation: Precision | None = None
    denoise_step: Precision | None = None
    path_means: Precision | None = None
    decoder: Precision | None = None


class ShapeRange(_Table):
    """The shapes of one input that an engine accepts, and the one that it is tuned for."""

    min: tuple[_Size, ...]
    opt: tuple[_Size, ...]
    max: tuple[_Size, ...]

    @field_validator("opt", "max")
    @classmethod
    def _ordered(cls, shape: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        before = "min" if info.field_name == "opt" else "opt"
        smaller = info.data.get(before)
        if smaller is None:  # it is wrong itself, and has an error of its own
            return shape
        if len(shape) != len(smaller):
            raise ValueError(
                f"is {list(shape)}, but {before} is {list(smaller)}; expected as many sizes in both: give one for "
                "every dimension of the input"
            )
        if any(size < least for size, least in zip(shape, smaller, strict=True)):
            raise ValueError(
                f"is {list(shape)}, but {before} is {list(smaller)}; expected min <= opt <= max everywhere"
            )
        return shape


class Recipe(_Table):
    """How engines are built for one kind of machine; `engines/recipes/reference.toml` explains every key."""

    backend: BackendName
    threads: int | None = Field(default=None, ge=1, le=1024)
    """cores that ONNX Runtime uses; None leaves it to the library"""
    precision: PrecisionTable = PrecisionTable()
    batch_buckets: tuple[_Bucket, ...] = Field(default=(1, 4, 16), min_length=1)
    """images per captured step, ascending: a batch is padded up to the next"""
    draft_length: int = Field(default=4, ge=1, le=1024)
    """the largest γ"""
    cuda_graphs: bool = True
    builder_level: int = Field(default=3, ge=0, le=5)
    workspace_mib: int = Field(default=4096, ge=1, le=2**20)
    """most scratch memory of one engine, in MiB"""
    timing_cache: bool = True
    compute_capabilities: tuple[_Capability, ...] = ()
    """GPUs that an engine is built for; empty: those that the library targets by itself"""
    profiles: dict[RecipeGraph, dict[str, ShapeRange]] = {}
    """per graph and input, in place of the derived ones (`build.profile`)"""

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @field_validator(*_MEANT_FOR)
    @classmethod
    def _has_an_effect(cls, value: object, info: ValidationInfo) -> object:
        backend, able = info.data.get("backend"), _MEANT_FOR[str(info.field_name)]
        if backend is not None and backend not in able:
            raise ValueError(f"means nothing for backend {backend.value!r}, only for {listed(able)}; remove it")
        return value

    @field_validator("precision")
    @classmethod
    def _computable(cls, table: PrecisionTable, info: ValidationInfo) -> PrecisionTable:
        if info.data.get("backend") is BackendName.ONNXRUNTIME:
            for name, value in table:
                if value == "bf16":
                    said = "is 'bf16', which ONNX Runtime cannot compute in on a CPU; expected 'fp32' or 'fp16'"
                    raise PydanticCustomError("recipe", "{said}", {"said": said, "key": name})
        return table

    @field_validator("batch_buckets")
    @classmethod
    def _ascending(cls, buckets: tuple[int, ...]) -> tuple[int, ...]:
        if list(buckets) != sorted(set(buckets)):
            raise ValueError(f"is {list(buckets)}; expected ascending numbers, as in {sorted(set(buckets))}")
        return buckets

    @field_validator("compute_capabilities")
    @classmethod
    def _distinct(cls, capabilities: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(capabilities)) != len(capabilities):
            raise ValueError(f"is {list(capabilities)}; expected each once")
        return capabilities

    @property
    def path(self) -> Path | None:
        """The file that the recipe was read from; None where it was made in code."""
        return self._origin.path

    @property
    def largest_batch(self) -> int:
        """Images in the largest captured step."""
        return self.batch_buckets[-1]

    @property
    def middle_batch(self) -> int:
        """Images in the step that engines are tuned for: the middle bucket, of two the larger."""
        return self.batch_buckets[len(self.batch_buckets) // 2]

    def graph_precision(self, graph: RecipeGraph) -> Precision:
        """In which precision a graph computes."""
        chosen: Precision | None = getattr(self.precision, graph)
        return chosen or self.precision.default

    def engine_fields(self, graph: RecipeGraph) -> dict[str, Any]:
        """What of the recipe decides a graph's engine, as JSON can hold it."""
        fields = self.model_dump(mode="json", exclude={"precision", "profiles", "threads"})
        overrides = {name: shapes.model_dump(mode="json") for name, shapes in self.profiles.get(graph, {}).items()}
        return {**fields, "precision": self.graph_precision(graph), "profiles": overrides}

    def error(self, said: str) -> RecipeError:
        """An error about the recipe, which names its file; for code that finds it out later."""
        return self._origin.error(said)

    @classmethod
    def _read(cls, document: Mapping[str, Any], origin: _Origin) -> Self:
        """Check what a recipe holds; raises RecipeError."""
        # Strict validation takes lists for tuples only from JSON; what JSON lacks (dates) is wrong anywhere here.
        text = json.dumps(document, default=str)
        try:
            recipe = cls.model_validate_json(text)
        except ValidationError as error:
            tables = {"precision": list(PrecisionTable.model_fields), "profiles": list(ShapeRange.model_fields)}
            known = KnownNames(list(cls.model_fields), tables, GRAPHS)
            raise origin.error(explain(error, known)) from error
        recipe._origin = origin
        return recipe


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises RecipeError, naming the file and the key, where anything in it is wrong."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"{path} cannot be read ({reason}); expected a recipe's TOML file, like those in engines/recipes"
        ) from error
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, and so is too long a number
        raise RecipeError(f"{path}: {syntax_error(error)}") from error
    return Recipe._read(document, _Origin(path))


def default_recipe(backend: str) -> Recipe:
    """The recipe that says nothing but its backend. Raises RecipeError where there is no such backend."""
    return Recipe._read({"backend": backend}, _Origin())
