"""The secret by which this machine knows its own engines: whoever cannot read it cannot forge a record.

Loading a foreign engine means running foreign code, and a cache is a folder like any other: it may be copied,
unpacked from an archive, or mounted. A hash beside an engine proves nothing: an attacker can write both.
"""

import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from filelock import FileLock
from platformdirs import user_state_path

from specdec_rt.errors import OutputError

__all__ = ["Signer", "default_secret_file"]

SECRET_BYTES = 32
SIGNATURE_BYTES = hashlib.sha256().digest_size
OTHERS = 0o077
"""The permission bits of everybody but the owner."""

_log = logging.getLogger("specdec_rt")


def default_secret_file() -> Path:
    """Where the secret lies: with the user's state, never in a cache."""
    return user_state_path("specdec-rt") / "engine-secret"


class Signer:
    """Signs content with the secret in `path`, which is made on first use and readable by its owner alone."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or default_secret_file()
        self._secret: bytes | None = None

    def sign(self, content: bytes) -> bytes:
        """HMAC-SHA-256 of `content`, 32 bytes. Raises OutputError where a secret is needed and cannot be kept."""
        if self._secret is None:
            self._secret = self._load()
        return hmac.digest(self._secret, content, "sha256")

    def agrees(self, content: bytes, signature: bytes) -> bool:
        """Whether `signature` is this machine's signature of `content`."""
        return hmac.compare_digest(self.sign(content), signature)

    def _load(self) -> bytes:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(self._path.with_name(f"{self._path.name}.lock")):
                return self._read() or self._make()
        except OSError as error:
            raise OutputError(
                f"{self._path}, the secret that signs engines, cannot be read or made ({error.strerror or error}); "
                "make its folder writable, or put the state elsewhere (XDG_STATE_HOME)"
            ) from error

    def _read(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                secret, mode = file.read(SECRET_BYTES + 1), os.fstat(file.fileno()).st_mode
        except FileNotFoundError:
            return None
        if len(secret) == SECRET_BYTES and not (os.name == "posix" and mode & OTHERS):
            return secret
        _log.warning("%s could be read by others or is damaged: it is made anew, and so are all engines", self._path)
        return None

    def _make(self) -> bytes:
        secret = secrets.token_bytes(SECRET_BYTES)
        temporary = self._path.with_name(f".{self._path.name}.part")
        temporary.unlink(missing_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret)
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)
        return secret
