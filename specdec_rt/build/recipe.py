"""A recipe: the TOML file that says how engines are built for one kind of machine."""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ValidationInfo

from specdec_rt.build.toml_lines import KeyPath, key_lines
from specdec_rt.errors import RecipeError
from specdec_rt.manifest import Precision

__all__ = [
    "BACKENDS",
    "GRAPHS",
    "PrecisionTable",
    "Recipe",
    "RecipeBackend",
    "RecipeGraph",
    "ShapeRange",
    "default_recipe",
    "read_recipe",
]

RecipeBackend = Literal["onnxruntime", "cuda", "tensorrt", "tensorrt-rtx"]
RecipeGraph = Literal["backbone", "time_embedding", "modulation", "denoise_step", "path_means", "decoder"]
"""The graphs of a model, and the bundle's decoder."""

BACKENDS: tuple[RecipeBackend, ...] = ("onnxruntime", "cuda", "tensorrt", "tensorrt-rtx")
GRAPHS: tuple[RecipeGraph, ...] = get_args(RecipeGraph)

_TENSORRT = ("tensorrt", "tensorrt-rtx")
_MEANT_FOR: Mapping[str, tuple[str, ...]] = {
    "threads": ("onnxruntime",),
    "cuda_graphs": ("cuda", *_TENSORRT),
    "builder_level": _TENSORRT,
    "workspace_mib": _TENSORRT,
    "timing_cache": ("tensorrt",),  # TensorRT-RTX times nothing while it builds
    "compute_capabilities": ("tensorrt-rtx",),
    "profiles": _TENSORRT,
}
"""Backends that a key has an effect on; a key that is not here has one on all."""

_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Bucket = Annotated[int, Field(ge=1, le=4096)]
_Capability = Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")]


@dataclass(frozen=True)
class _Source:
    """Where a recipe was read from. Two recipes that say the same are equal wherever they stand."""

    path: Path | None = field(default=None, compare=False)
    lines: Mapping[KeyPath, int] = field(default_factory=dict, compare=False)

    def error(self, keys: KeyPath, said: str) -> RecipeError:
        """`said` of the value at `keys`, with the file and the line of the innermost key that is written there."""
        if self.path is None:
            return RecipeError(f"recipe: {said}")
        known = (self.lines[keys[:count]] for count in range(len(keys), 0, -1) if keys[:count] in self.lines)
        return RecipeError(f"{self.path}:{next(known, 1)}: {said}")


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
        if smaller is None:  # it was wrong itself, and is told of
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

    backend: RecipeBackend
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

    _source: _Source = PrivateAttr(default_factory=_Source)

    @field_validator(*_MEANT_FOR)
    @classmethod
    def _means_something(cls, value: object, info: ValidationInfo) -> object:
        backend, able = info.data.get("backend"), _MEANT_FOR[str(info.field_name)]
        if backend is not None and backend not in able:
            raise ValueError(f"means nothing for backend {backend!r}, only for {_listed(able)}; remove it")
        return value

    @field_validator("precision")
    @classmethod
    def _computable(cls, table: PrecisionTable, info: ValidationInfo) -> PrecisionTable:
        if info.data.get("backend") == "onnxruntime":
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
        return self._source.path

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

    def error(self, keys: KeyPath, said: str) -> RecipeError:
        """The error `said` of the value at `keys`, naming file and line; for whoever finds it out later."""
        return self._source.error(keys, said)

    @classmethod
    def _read(cls, document: Mapping[str, Any], source: _Source) -> Self:
        """Check what a recipe holds; raises RecipeError."""
        # Strict validation takes lists for tuples only from JSON; what JSON lacks (dates) is wrong anywhere here.
        text = json.dumps(document, default=str)
        try:
            recipe = cls.model_validate_json(text)
        except ValidationError as error:
            problems = [_explain(problem) for problem in error.errors()]
            # A misspelt key before the one that is missing for it, then in the file's order.
            problems.sort(key=lambda problem: (not problem[1].startswith("unknown"), source.lines.get(problem[0], 0)))
            raise source.error(*problems[0]) from error
        recipe._source = source
        return recipe


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises RecipeError, naming file and line, where anything in it is wrong."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"{path} cannot be read ({reason}); expected a recipe's TOML file, like those in engines/recipes"
        ) from error
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
        document = tomllib.loads(text)
        lines = key_lines(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, and so is too long a number
        raise RecipeError(_syntax(path, text, error)) from error
    return Recipe._read(document, _Source(path, lines))


def default_recipe(backend: str) -> Recipe:
    """The recipe that says nothing but its backend. Raises RecipeError where there is no such backend."""
    return Recipe._read({"backend": backend}, _Source())


def _syntax(path: Path, text: str, error: Exception) -> str:
    said = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
    if said is None:
        return f"{path}:1: is not TOML that can be read ({error}); see https://toml.io"
    end = text.rstrip("\n").count("\n") + 1
    place = f", column {said[3]}" if said[3] else ", at the end"
    return f"{path}:{said[2] or end}: is not TOML: {said[1][:1].lower()}{said[1][1:]}{place}; see https://toml.io"


def _explain(problem: ErrorDetails) -> tuple[KeyPath, str]:
    """Where a problem is, and what to say of it."""
    keys, message, context = problem["loc"], problem["msg"], problem.get("ctx", {})
    if keys[-1:] == ("[key]",):
        keys = keys[:-1]
        return keys, f"unknown graph {keys[-1]!r} in profiles{_expected(keys[-1], GRAPHS)}"
    if problem["type"] == "recipe":
        keys = (*keys, context["key"])
    named = ".".join(str(key) for key in keys)
    match problem["type"]:
        case "extra_forbidden":
            return keys, f"unknown key {named!r}{_expected(keys[-1], _known_keys(keys))}"
        case "missing":
            return keys, f"{named} is missing; add {_listed(BACKENDS) if keys == ('backend',) else 'it'}"
        case "value_error":
            return keys, f"{named} {message.removeprefix('Value error, ')}"
        case "recipe":
            return keys, f"{named} {message}"
        case "string_pattern_mismatch":
            message = "a compute capability as in '8.9'"
        case "too_short":
            message = "at least one number"
        case "greater_than_equal":
            message = f"at least {context['ge']}"
        case "less_than_equal":
            message = f"at most {context['le']}"
        case "model_type" | "dict_type":
            message = "a table"
        case "tuple_type":
            message = "a list"
    return keys, f"{named} is {_shown(problem['input'])}; expected {message.removeprefix('Input should be ')}"


def _known_keys(keys: KeyPath) -> tuple[str, ...]:
    inner: dict[object, type[_Table]] = {"precision": PrecisionTable, "profiles": ShapeRange}
    table = inner[keys[0]] if len(keys) > 1 else Recipe
    return tuple(table.model_fields)


def _expected(given: object, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"; expected {_listed(known)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _listed(names: tuple[str, ...]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
