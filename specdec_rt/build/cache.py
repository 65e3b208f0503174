"""Engines on disk: found by what they were built from, given out only if this machine's own build put them there.

An entry is two files, `KEY.plan` (the serialised engine) and `KEY.json` (its record: SHA-256, what it was built
from, this machine's signature). Several processes may share a folder.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, ValidationError

from specdec_rt.build.profile import Profile
from specdec_rt.build.trust import SIGNATURE_BYTES, Signer
from specdec_rt.errors import OutputError
from specdec_rt.manifest import Binding, Precision

__all__ = ["EngineCache", "EngineRecord", "Entry", "default_cache_folder", "engine_key"]

SCHEMA_VERSION = 1
LIMIT_BYTES = 20 * 2**30
_OURS = re.compile(r"[0-9a-f]{64}\.(plan|json|timing)|\.[0-9a-f]{64}\.(plan|json|timing)\.part")
"""Names that this module gives; other files in the folder are none of its business."""

FOREIGN = "its record was altered, or is that of another machine or user"

_log = logging.getLogger("specdec_rt")


def default_cache_folder() -> Path:
    """Where engines are kept unless the user says otherwise."""
    return user_cache_path("specdec-rt") / "engines"


def engine_key(fields: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of everything that decides an engine, as JSON can hold it."""
    return hashlib.sha256(_canonical(fields)).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


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
    profiles: dict[str, Profile]
    fields: dict[str, Any]
    """what the key is made of"""
    build_seconds: float
    created: str = ""
    """UTC, ISO 8601"""
    plan_bytes: int = 0
    plan_sha256: str = ""


@dataclass(frozen=True)
class Entry:
    """An engine in the cache whose record this machine signed."""

    key: str
    record: EngineRecord
    path: Path
    """of the plan"""


class EngineCache:
    """The engines in `folder`; the least recently used go where all of them exceed `limit_bytes`.

    Whatever this machine's build did not record is removed when it is met, with a warning that says why.
    Methods raise OutputError where the folder cannot be used.
    """

    def __init__(
        self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES, *, signer: Signer | None = None
    ) -> None:
        self.folder = folder or default_cache_folder()
        self.limit_bytes = limit_bytes
        self._signer = signer or Signer()

    def lookup(self, key: str) -> Entry | None:
        """The entry called `key`, if there is one whose record can be trusted. The plan itself is not read."""
        with self._lock():
            return self._trusted(key)

    def read(self, key: str) -> bytes | None:
        """The plan called `key`; None where there is none, or none that this machine's build recorded as it is."""
        with self._lock():
            entry = self._trusted(key)
            if entry is None:
                return None
            plan = entry.path.read_bytes()
            if hashlib.sha256(plan).hexdigest() != entry.record.plan_sha256:
                self._refuse(key, "its plan is not the one that was recorded: it is damaged or was altered")
                return None
            os.utime(entry.path)  # the time of its last use
            return plan

    def entries(self) -> list[Entry]:
        """All entries whose records can be trusted, the last used first; others are left as they are."""
        if not self.folder.is_dir():
            return []
        with self._lock():
            found = [self._trusted(path.stem, remove=False) for path in self._plans()]
        return [entry for entry in reversed(found) if entry is not None]

    def store(self, key: str, plan: bytes, record: EngineRecord) -> Entry:
        """Keep a plan under `key`, in place of an older one; it appears whole or not at all."""
        record = record.model_copy(
            update={
                "plan_bytes": len(plan),
                "plan_sha256": hashlib.sha256(plan).hexdigest(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        content = record.model_dump(mode="json")
        signed = {"record": content, "signature": self._signer.sign(_canonical([key, content])).hex()}
        with self._lock():
            self._write(self._plan(key), plan)
            self._write(self._record(key), json.dumps(signed, indent=1).encode())
            self._evict(keep=key)
        return Entry(key, record, self._plan(key))

    def clear(self) -> int:
        """Remove all engines and timing caches; returns how many engines there were."""
        if not self.folder.is_dir():
            return 0
        with self._lock():
            plans = self._plans()
            for path in self._files(""):
                path.unlink(missing_ok=True)
        return len(plans)

    @property
    def size_bytes(self) -> int:
        """Of all engines."""
        if not self.folder.is_dir():
            return 0
        with self._lock():
            return sum(path.stat().st_size for path in self._plans())

    # --- timing caches: TensorRT's measurements of kernels, which make later builds quicker --------------

    def read_timing(self, key: str) -> bytes:
        """The timing cache called `key`; empty where there is none that this machine wrote."""
        path = self.folder / f"{key}.timing"
        with self._lock():
            if not path.is_file():
                return b""
            content = path.read_bytes()
            signature, timing = content[:SIGNATURE_BYTES], content[SIGNATURE_BYTES:]
            if self._signer.agrees(key.encode() + timing, signature):
                return timing
            _log.warning("%s is damaged, or another machine's: it is not used", path)
            path.unlink(missing_ok=True)
            return b""

    def store_timing(self, key: str, timing: bytes) -> None:
        """Keep a timing cache under `key`."""
        with self._lock():
            self._write(self.folder / f"{key}.timing", self._signer.sign(key.encode() + timing) + timing)

    # --- one process at a time ---------------------------------------------------------------------------

    @contextmanager
    def building(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Builds of all processes on this folder come one after the other; `waiting` is told if it takes that.

        Two that want the same engine build it once, and kernels are timed on a GPU that does nothing else.
        """
        with self._telling():
            lock = FileLock(self.folder / ".build.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                waiting()
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with self._telling(), FileLock(self.folder / ".lock"):
            yield

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            yield
        except OSError as error:
            raise OutputError(
                f"the engine cache {self.folder} cannot be used ({error.strerror or error}); "
                "choose another folder: --cache DIR"
            ) from error

    # --- what happens under the lock ---------------------------------------------------------------------

    def _plan(self, key: str) -> Path:
        return self.folder / f"{key}.plan"

    def _record(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _plans(self) -> list[Path]:
        """The last used last."""
        return sorted(self._files(".plan"), key=lambda path: path.stat().st_mtime_ns)

    def _files(self, suffix: str) -> list[Path]:
        """Files that this module wrote, whose names end so."""
        return [path for path in self.folder.glob(f"*{suffix}") if _OURS.fullmatch(path.name)]

    def _trusted(self, key: str, *, remove: bool = True) -> Entry | None:
        plan, path = self._plan(key), self._record(key)
        if not plan.exists() and not path.exists():
            return None
        record, why = self._judge(key, path, plan) if path.exists() else (None, "it has no record")
        if record is not None:
            return Entry(key, record, plan)
        if remove and why == FOREIGN:
            # It may be good for whoever holds that secret: a build of our own takes its place, a refusal does not.
            _log.warning("the engine %s is not used, %s", plan, why)
        elif remove:
            self._refuse(key, why)
        return None

    def _judge(self, key: str, path: Path, plan: Path) -> tuple[EngineRecord | None, str]:
        """The record, or why it does not count."""
        try:
            found = json.loads(path.read_bytes())
            content, signature = found["record"], bytes.fromhex(found["signature"])
            signed = _canonical([key, content])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None, "its record cannot be read"
        if not self._signer.agrees(signed, signature):
            return None, FOREIGN
        try:
            record = EngineRecord.model_validate_json(json.dumps(content))
        except ValidationError:
            return None, "its record is that of another release"
        if record.schema_version != SCHEMA_VERSION or engine_key(record.fields) != key:
            return None, "its record is that of another release"
        if not plan.is_file() or plan.stat().st_size != record.plan_bytes:
            return None, "its plan is missing or was cut off"
        return record, ""

    def _refuse(self, key: str, why: str) -> None:
        """Remove an entry that must not be used, and say so."""
        _log.warning("the engine %s is not used, %s; it is removed", self._plan(key), why)
        self._remove(key)

    def _remove(self, key: str) -> None:
        self._record(key).unlink(missing_ok=True)
        self._plan(key).unlink(missing_ok=True)

    def _evict(self, *, keep: str) -> None:
        plans = self._plans()
        total = sum(path.stat().st_size for path in plans)
        for path in plans:
            if total <= self.limit_bytes:
                return
            if path.stem != keep:
                total -= path.stat().st_size
                self._remove(path.stem)

    def _write(self, path: Path, content: bytes) -> None:
        for left in self._files(".part"):  # of a process that was killed: who writes holds the lock
            left.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
