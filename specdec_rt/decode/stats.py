"""What decoding cost: counters that it fills, and the figures of one request."""

from collections import Counter
from dataclasses import dataclass, field

from specdec_rt.config import Mode

__all__ = ["Counters", "Stats"]


@dataclass
class Counters:
    """Sums over images: a batched call for B images counts B."""

    rounds: int = 0
    drafted: int = 0
    """tokens that the draft proposed"""
    accepted: int = 0
    rejected: int = 0
    """rejections in a round's first AR step that has one; drafts after that are dropped unjudged"""
    target_backbone_calls: int = 0
    draft_backbone_calls: int = 0
    sequential_head_calls: int = 0
    """single steps of a chain, of either model; a batched verification is none"""
    draft_lengths: Counter[int] = field(default_factory=Counter)
    """rounds by the AR steps drafted in them. Where the length is chosen automatically, 0 stands for the AR steps that
    the target made alone: those are no rounds"""

    @property
    def committed(self) -> int:
        """Tokens that rounds committed; prefilled ones are not among them."""
        return self.accepted + self.rejected

    def add(self, other: "Counters") -> None:
        """Take in what others counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.draft_lengths = Counter(dict(sorted(self.draft_lengths.items())))


@dataclass(kw_only=True)
class Stats(Counters):
    """The figures of one request; ratios are None where nothing was drafted."""

    mode: Mode
    backend: str
    images: int
    seconds: float

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / (accepted + rejected)."""
        return self.accepted / self.committed if self.committed else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens committed per round and image."""
        return self.committed / self.rounds if self.rounds else None

    @property
    def images_per_second(self) -> float:
        """Images made per second."""
        return self.images / self.seconds

    def as_dict(self) -> dict[str, object]:
        """The figures as plain values, for JSON."""
        names = ["mode", "backend", "images", "rounds", "acceptance_rate", "tokens_per_round", "draft_lengths"]
        names += ["target_backbone_calls", "draft_backbone_calls", "sequential_head_calls"]
        return {name: getattr(self, name) for name in [*names, "seconds", "images_per_second"]}
