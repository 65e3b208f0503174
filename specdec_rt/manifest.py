"""`manifest.json`: what a bundle says of itself. The only place that names bindings."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from specdec_rt.chain import ChainSpec
from specdec_rt.config import LARGEST, GuidanceSchedule, Mode

__all__ = [
    "HEAD_GRAPHS",
    "MANIFEST",
    "WEIGHTS_KEY",
    "Binding",
    "Bindings",
    "CacheShape",
    "Decoder",
    "Defaults",
    "Dimensions",
    "Family",
    "Graph",
    "GraphName",
    "ImageLayout",
    "Manifest",
    "Model",
    "Precision",
    "decoder_bindings",
    "graph_bindings",
]

MANIFEST = "manifest.json"
WEIGHTS_KEY = "specdec_rt.weights"
"""Of an ONNX file's own metadata: how many weights its graph holds."""

Family = Literal["causal", "mar"]
Precision = Literal["fp32", "fp16", "bf16"]


class GraphName(StrEnum):
    """The graphs of a model."""

    BACKBONE = "backbone"
    TIME_EMBEDDING = "time_embedding"
    MODULATION = "modulation"
    DENOISE_STEP = "denoise_step"
    PATH_MEANS = "path_means"


HEAD_GRAPHS = (GraphName.TIME_EMBEDDING, GraphName.MODULATION, GraphName.DENOISE_STEP, GraphName.PATH_MEANS)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Binding(_Record):
    """One input or output of a graph; a string in `shape` is a size fixed only when the graph runs."""

    name: str
    dtype: Literal["float32", "int64", "bool"]
    shape: tuple[int | str, ...]


class Graph(_Record):
    """An ONNX file of the bundle and its bindings, in the file's order."""

    file: str
    """which computes in single precision"""
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    variants: dict[Precision, str] = Field(default_factory=dict)
    """files of the same graph, over the same bindings and weights, that compute in fp16 or bf16"""


class CacheShape(_Record):
    """Keys and values that a causal backbone keeps for each token."""

    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)


class Model(_Record):
    """A target or a draft."""

    parameters: int = Field(ge=1)
    """weights of its own (a draft on the target's head counts none of that head)"""
    z_dim: int = Field(ge=1)
    head: Literal["own", "target"]
    head_width: int | None = Field(ge=1)
    """W, values in a row of the time table; None where the head is the target's"""
    modulation_width: int | None = Field(ge=1)
    """M, values that a condition makes of the head at one step; None where the head is the target's"""
    cache: CacheShape | None
    """None in a family without caches"""
    graphs: dict[GraphName, Graph]


class ImageLayout(_Record):
    """How tokens tile an image in raster order.

    Where no decoder makes the pixels, a token's values are its patch's pixels in [-1, 1]: row by row, and
    within a pixel channel by channel in the causal family; channel by channel, each row by row, in MAR's.
    """

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[1, 3]
    patch: int = Field(ge=1)
    """pixels per token along each side"""


class Decoder(_Record):
    """The graph that turns all tokens of an image into its pixels in [-1, 1] (a VAE's decoder)."""

    parameters: int = Field(ge=1)
    graph: Graph


class Defaults(_Record):
    """What a request takes where it says nothing."""

    mode: Mode
    draft: str
    draft_length: int = Field(ge=1)
    guidance: float = Field(ge=0, le=LARGEST)
    guidance_schedule: GuidanceSchedule
    ar_steps: int = Field(ge=1)
    """steps that all tokens of an image are made in: as many as tokens in the causal family"""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What the bindings of a bundle's graphs depend on, beside the model."""

    family: Family
    tokens: int
    token_dim: int
    learned_variance: bool


class Manifest(_Record):
    """`manifest.json`."""

    schema_version: Literal[4]
    name: str
    family: Family
    precision: Precision
    """in which weights are stored"""
    tokens: int = Field(ge=1)
    token_dim: int = Field(ge=1)
    classes: int = Field(ge=1)
    image: ImageLayout | None
    """None where nothing says how tokens become pixels: such a bundle makes tokens only"""
    chain: ChainSpec
    defaults: Defaults
    target: Model
    drafts: dict[str, Model]
    decoder: Decoder | None
    """None where tokens are pixels already, or stay tokens"""
    files: dict[str, str]
    """SHA-256 of every other file of the bundle"""
    provenance: dict[str, Any]
    """training command, data, licence, figures measured"""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if Path(name).name != name or name == MANIFEST:
                raise ValueError(f"{name!r} is not the plain name of a file beside the manifest")
        return files

    @property
    def dimensions(self) -> Dimensions:
        """What the bindings of the graphs depend on."""
        return Dimensions(
            family=self.family,
            tokens=self.tokens,
            token_dim=self.token_dim,
            learned_variance=self.chain.variance == "learned",
        )

    def model(self, name: str | None) -> Model:
        """The draft called `name`, or the target for None."""
        return self.target if name is None else self.drafts[name]


Bindings = tuple[tuple[Binding, ...], tuple[Binding, ...]]
"""Inputs, outputs."""


def _floats(name: str, *shape: int | str) -> Binding:
    return Binding(name=name, dtype="float32", shape=shape)


def _ints(name: str, *shape: int | str) -> Binding:
    return Binding(name=name, dtype="int64", shape=shape)


def graph_bindings(name: GraphName, model: Model, dimensions: Dimensions) -> Bindings:
    """Inputs and outputs that graph `name` of `model` must have; letters as in `types`.

    In `denoise_step` and `path_means` the rows' prediction is the sum over the G guidance branches of
    `guidance[g] ε̂(z[g])`; `coefficients` is `Chain.coefficients`, `time_table` holds `time_embedding`
    of each of the chain's n steps. `modulation` makes what P pairs of a row and a step need of z and time, in
    each of G branches; `path_means` takes it step by step.
    `std` stands only where variances are learned: σ of each value, which the first branch alone decides
    (as in MAR).
    """
    dim = dimensions.token_dim
    width = model.head_width or 0  # a model without a head has no graph that needs it
    z, guidance = _floats("z", "G", "R", model.z_dim), _floats("guidance", "G", "R")
    time_table, coefficients = _floats("time_table", "n", width), _floats("coefficients", "n", 4)
    match name:
        case GraphName.BACKBONE:
            return _backbone_bindings(model, dimensions)
        case GraphName.TIME_EMBEDDING:
            return (_ints("timestep", "n"),), (_floats("time_table", "n", width),)
        case GraphName.MODULATION:
            pairs = _ints("row", "P"), time_table, _ints("step", "P")
            return (z, *pairs), (_floats("modulation", "P_times_G", model.modulation_width or 0),)
        case GraphName.DENOISE_STEP:
            std = (_floats("std", "R", dim),) if dimensions.learned_variance else ()
            made = _floats("modulation", "R", "G", model.modulation_width or 0)
            state, noise = _floats("state", "R", dim), _floats("noise", "R", dim)
            drawn = _floats("next_state", "R", dim), _floats("mean", "R", dim), *std
            return (state, made, guidance, coefficients, _ints("step", "R"), noise), drawn
        case GraphName.PATH_MEANS:
            std = (_floats("std", "R", "n", dim),) if dimensions.learned_variance else ()
            path = _floats("path", "R", "n_plus_1", dim)
            made = _floats("modulation", "n", "R", "G", model.modulation_width or 0)
            return (path, made, guidance, coefficients), (_floats("mean", "R", "n", dim), *std)


def _backbone_bindings(model: Model, dimensions: Dimensions) -> Bindings:
    dim = dimensions.token_dim
    if dimensions.family == "mar":
        return (
            _floats("tokens", "B", dimensions.tokens, dim),
            _ints("visible", "B", "K"),
            Binding(name="visible_mask", dtype="bool", shape=("B", "K")),
            _ints("label", "B"),
            _ints("query", "B", "Q"),
        ), (_floats("z", "B", "Q", model.z_dim),)
    assert model.cache is not None
    slots = [
        (f"{kind}_{layer}", ("B", model.cache.heads, "S", model.cache.head_dim))
        for layer in range(model.cache.layers)
        for kind in ("key", "value")
    ]
    caches = tuple(_floats(cache, *shape) for cache, shape in slots)
    updated = tuple(_floats(f"{cache}_out", *shape) for cache, shape in slots)
    inputs = (_floats("tokens", "B", "N", dim), _ints("position", "B"), _ints("label", "B"), *caches)
    return inputs, (_floats("z", "B", "N", model.z_dim), *updated)


def decoder_bindings(dimensions: Dimensions, image: ImageLayout) -> Bindings:
    """Inputs and outputs of a bundle's decoder."""
    tokens = _floats("tokens", "B", dimensions.tokens, dimensions.token_dim)
    return (tokens,), (_floats("pixels", "B", image.height, image.width, image.channels),)
