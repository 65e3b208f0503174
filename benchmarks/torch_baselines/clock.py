"""How long a baseline spends in its backbone and in its head."""

import time
from dataclasses import dataclass, field
from types import TracebackType

__all__ = ["Part", "Parts"]


@dataclass
class Part:
    """Adds up the time inside `with`."""

    seconds: float = 0.0
    _began: float = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True)
class Parts:
    """Of one baseline."""

    backbone: Part = field(default_factory=Part)
    head: Part = field(default_factory=Part)

    def clear(self) -> None:
        """Begin anew."""
        self.backbone.seconds = self.head.seconds = 0.0
