"""What decoding cost: counters that the loop fills, and the figures made of them."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from specdec_rt.config import Mode

__all__ = ["Counters", "Stats"]


@dataclass
class Counters:
    """Sums over images: a batched call for B images counts B."""

    rounds: int = 0
    committed: int = 0
    """tokens that rounds committed (prefilled ones are not among them)"""
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    """rejections in the first AR step that has one; drafts after that are dropped unjudged"""
    target_backbone_calls: int = 0
    draft_backbone_calls: int = 0
    sequential_head_calls: int = 0
    """single steps of a chain, of either model; a batched verification is none"""
    draft_lengths: Counter[int] = field(default_factory=Counter)
    """rounds by the AR steps drafted in them; at 0 the AR steps that a pace left to the target alone, no rounds"""

    def add(self, other: "Counters") -> None:
        """Take in what others counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The figures of one request; ratios are None where nothing was drafted."""

    mode: Mode
    backend: str
    images: int
    rounds: int
    drafted: int
    """tokens that the draft proposed"""
    accepted: int
    rejected: int
    """rejections in a round's first AR step that has one; drafts after that are dropped unjudged"""
    acceptance_rate: float | None
    """accepted / (accepted + rejected)"""
    tokens_per_round: float | None
    draft_lengths: dict[int, int]
    """rounds by the AR steps drafted in them, ascending. Where draft_length is "auto", 0 stands for the AR steps that
    the target was left to make alone: those are no rounds"""
    target_backbone_calls: int
    draft_backbone_calls: int
    sequential_head_calls: int
    seconds: float
    images_per_second: float

    @classmethod
    def of(cls, counters: Counters, *, mode: Mode, backend: str, images: int, seconds: float) -> "Stats":
        """The figures that `counters` amount to."""
        judged = counters.accepted + counters.rejected
        return cls(
            mode=mode,
            backend=backend,
            images=images,
            rounds=counters.rounds,
            drafted=counters.drafted,
            accepted=counters.accepted,
            rejected=counters.rejected,
            acceptance_rate=counters.accepted / judged if judged else None,
            tokens_per_round=counters.committed / counters.rounds if counters.rounds else None,
            draft_lengths=dict(sorted(counters.draft_lengths.items())),
            target_backbone_calls=counters.target_backbone_calls,
            draft_backbone_calls=counters.draft_backbone_calls,
            sequential_head_calls=counters.sequential_head_calls,
            seconds=seconds,
            images_per_second=images / seconds,
        )

    def as_dict(self) -> dict[str, object]:
        """The fields as plain values, for JSON; of the counts behind the rate it holds none."""
        return {name: value for name, value in asdict(self).items() if name not in ("drafted", "accepted", "rejected")}
