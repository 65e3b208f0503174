"""Engines on disk: found by what they were built from, given out only if this machine's own build put them there.

An engine is two files, `KEY.plan` (the serialised engine, which TensorRT calls a plan) and `KEY.json` (its record:
SHA-256, what it was built from, this machine's signature). Several processes may share a folder.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from pydantic import ValidationError

from specdec_rt.build.engine_record import SCHEMA_VERSION, CachedEngine, EngineRecord, canonical_json, engine_key
from specdec_rt.build.trust import SIGNATURE_BYTES, Signer
from specdec_rt.errors import OutputError

__all__ = ["EngineCache", "default_cache_folder"]

LIMIT_BYTES = 20 * 2**30
_OURS = re.compile(r"[0-9a-f]{64}\.(plan|json|timing)|\.[0-9a-f]{64}\.(plan|json|timing)\.part")
"""Names that this module gives; other files in the folder are none of its business."""

FOREIGN = "its record was altered, or is that of another machine or user"
OTHER_RELEASE = "its record is that of another release"

_log = logging.getLogger("specdec_rt")


def default_cache_folder() -> Path:
    """Where engines are kept unless the user says otherwise."""
    return user_cache_path("specdec-rt") / "engines"


class EngineCache:
    """The engines in `folder`; the least recently used are removed where all of them exceed `limit_bytes`.

    Whatever this machine's build did not record is removed when it is met, with a warning that says why.
    Methods raise OutputError where the folder cannot be used.
    """

    def __init__(
        self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES, *, signer: Signer | None = None
    ) -> None:
        self.folder = folder or default_cache_folder()
        self.limit_bytes = limit_bytes
        self._signer = signer or Signer()

    def lookup(self, key: str) -> CachedEngine | None:
        """The engine called `key`, if there is one whose record can be trusted. The plan itself is not read."""
        with self._lock():
            return self._trusted(key)

    def read(self, key: str) -> bytes | None:
        """The plan called `key`; None where there is none, or none that this machine's build recorded as it is."""
        with self._lock():
            engine = self._trusted(key)
            if engine is None:
                return None
            plan = engine.path.read_bytes()
            if hashlib.sha256(plan).hexdigest() != engine.record.plan_sha256:
                self._refuse(key, "its plan is not the one that was recorded: it is damaged or was altered")
                return None
            os.utime(engine.path)  # the time of its last use
            return plan

    def entries(self) -> list[CachedEngine]:
        """All engines whose records can be trusted, the last used first; others are left as they are."""
        if not self.folder.is_dir():
            return []
        with self._lock():
            found = [self._trusted(path.stem, remove=False) for path in self._plans()]
        return [engine for engine in reversed(found) if engine is not None]

    def store(self, key: str, plan: bytes, record: EngineRecord) -> CachedEngine:
        """Keep a plan under `key`, in place of an older one; it appears whole or not at all."""
        record = record.model_copy(
            update={
                "plan_bytes": len(plan),
                "plan_sha256": hashlib.sha256(plan).hexdigest(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        content = record.model_dump(mode="json")
        signed = {"record": content, "signature": self._signer.sign(canonical_json([key, content])).hex()}
        with self._lock():
            self._write(self._plan(key), plan)
            self._write(self._record(key), json.dumps(signed, indent=1).encode())
            self._evict(keep=key)
        return CachedEngine(key, record, self._plan(key))

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
        """One build at a time, of all processes that use the folder; `waiting` is called before it waits for another.

        Two processes that want the same engine build it once, and kernels are timed on a GPU that does nothing else.
        """
        with self._translate_os_errors():
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
        with self._translate_os_errors(), FileLock(self.folder / ".lock"):
            yield

    @contextmanager
    def _translate_os_errors(self) -> Iterator[None]:
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
        """Plans in the order of their last use, the latest last."""
        return sorted(self._files(".plan"), key=lambda path: path.stat().st_mtime_ns)

    def _files(self, suffix: str) -> list[Path]:
        """Files that this module wrote, whose names end so."""
        return [path for path in self.folder.glob(f"*{suffix}") if _OURS.fullmatch(path.name)]

    def _trusted(self, key: str, *, remove: bool = True) -> CachedEngine | None:
        plan, path = self._plan(key), self._record(key)
        if not plan.exists() and not path.exists():
            return None
        record, why = self._judge(key, path, plan) if path.exists() else (None, "it has no record")
        if record is not None:
            return CachedEngine(key, record, plan)
        if remove and why == FOREIGN:
            # It may be good for its owner, who holds another secret: a build here replaces it, a refusal does not.
            _log.warning("the engine %s is not used, %s", plan, why)
        elif remove:
            self._refuse(key, why)
        return None

    def _judge(self, key: str, path: Path, plan: Path) -> tuple[EngineRecord | None, str]:
        """The record, or why it does not count."""
        try:
            found = json.loads(path.read_bytes())
            content, signature = found["record"], bytes.fromhex(found["signature"])
            signed = canonical_json([key, content])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None, "its record cannot be read"
        if not self._signer.agrees(signed, signature):
            return None, FOREIGN
        try:
            record = EngineRecord.model_validate_json(json.dumps(content))
        except ValidationError:
            return None, OTHER_RELEASE
        if record.schema_version != SCHEMA_VERSION or engine_key(record.fields) != key:
            return None, OTHER_RELEASE
        if not plan.is_file() or plan.stat().st_size != record.plan_bytes:
            return None, "its plan is missing or was cut off"
        return record, ""

    def _refuse(self, key: str, why: str) -> None:
        """Remove an engine that must not be used, and say so."""
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
        for left in self._files(".part"):  # of a process that was killed: no other writes while this one has the lock
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
