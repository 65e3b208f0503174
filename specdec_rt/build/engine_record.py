"""What the cache knows of an engine: where it comes from, and the key that it is found by."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from specdec_rt.backends.tensorrt_builder import ShapeProfile
from specdec_rt.manifest import Binding, Precision

__all__ = ["SCHEMA_VERSION", "CachedEngine", "EngineRecord", "canonical_json", "engine_key"]

SCHEMA_VERSION = 1


class EngineRecord(BaseModel):
    """`KEY.json`: what an engine is and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: int = SCHEMA_VERSION
    bundle: str
    graph: str
    """as in "target.backbone" """
    precision: Precision
    backend: str
    library: str
    """the backend's version"""
    gpu: str | None
    """the GPU at hand when it was built; None: there was none"""
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    profiles: dict[str, ShapeProfile]
    fields: dict[str, Any]
    """what the key is made of"""
    build_seconds: float
    created: str = ""
    """UTC, ISO 8601"""
    plan_bytes: int = 0
    plan_sha256: str = ""


@dataclass(frozen=True)
class CachedEngine:
    """An engine in the cache whose record this machine signed."""

    key: str
    record: EngineRecord
    path: Path
    """of the plan"""


def engine_key(fields: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of everything that decides an engine, as JSON can hold it."""
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def canonical_json(value: object) -> bytes:
    """The one way to write a value as JSON, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
