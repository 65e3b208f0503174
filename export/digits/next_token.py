"""How far a mode's next token is from the target's, in fixed contexts: sharper than whole images, and cheaper."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from specdec_rt.decode.chain import Head
from specdec_rt.decode.draft import ChainNoise, Proposal
from specdec_rt.decode.loop import PAPER_TRIES
from specdec_rt.decode.verify import ResidualDraws, complete_exact, complete_paper, judge_exact, judge_paper
from torch import Tensor

from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import FloatArray

__all__ = ["energy_distance", "next_token_distances"]

CONTEXTS, DRAWS = 16, 1000


@dataclass(frozen=True)
class Context:
    """One context: both models' conditions for the next token, repeated for each draw."""

    target_z: FloatArray
    """`[G, DRAWS, Z]`"""
    draft_z: FloatArray
    guidance: FloatArray
    """`[G, DRAWS]`"""


def next_token_distances(pipeline: Pipeline, draft: str, taus: Sequence[float]) -> dict[str, Any]:
    """Acceptance and energy distance to the target's next token, averaged over contexts of a MAR bundle.

    Of `target` (the noise floor: another sample of the same distribution), `draft`, `exact`, and `paper`
    at each τ.
    """
    session, contexts = _contexts(pipeline, draft)
    assert session.steps.draft is not None
    target, drafter = session.target.head, session.steps.draft.head
    rng = np.random.default_rng(1)
    wanted = [_alone(target, context.target_z, context, rng) for context in contexts]
    modes: dict[str, Callable[[Context], tuple[FloatArray, float | None]]] = {
        "target": lambda context: (_alone(target, context.target_z, context, rng), None),
        "draft": lambda context: (_alone(drafter, context.draft_z, context, rng), None),
        "exact": partial(_exact, target, drafter, rng),
        **{f"tau_{tau}": partial(_paper, target, drafter, rng, tau) for tau in taus},
    }
    figures = {}
    for name, draw in modes.items():
        drawn = [draw(context) for context in contexts]
        figures[name] = {
            "acceptance_rate": None if drawn[0][1] is None else float(np.mean([accepted for _, accepted in drawn])),
            "energy_distance": float(
                np.mean([_apart(tokens, other) for (tokens, _), other in zip(drawn, wanted, strict=True)])
            ),
        }
    return figures


def _contexts(pipeline: Pipeline, draft: str) -> tuple[Any, list[Context]]:
    """Random places of the target's own images, as many known as uniform chance has it."""
    manifest, rng = pipeline.bundle.manifest, np.random.default_rng(0)
    labels = np.arange(CONTEXTS) % manifest.classes
    images = pipeline.generate(labels, seed=5, mode="target").tokens
    known = images + manifest.chain.final_std * rng.standard_normal(images.shape, dtype=np.float32)
    session = pipeline.session(DecodeOptions(mode="exact", draft=draft, ar_steps=manifest.tokens))
    order = np.stack([rng.permutation(manifest.tokens) for _ in labels])
    count = rng.integers(0, manifest.tokens, CONTEXTS)
    span = PositionBatch.of(order, np.arange(manifest.tokens + 1), count, 1)
    for model in session.steps.models:
        model.backbone.begin(labels)
    z, draft_z = (model.backbone.condition(known, span) for model in session.steps.models)
    guidance = session.plan.guidance_at(span.ar_step)
    return session, [
        Context(*(np.repeat(values[:, i : i + 1], DRAWS, axis=1) for values in (z, draft_z, guidance)))
        for i in range(CONTEXTS)
    ]


def _noise(head: Head, rng: np.random.Generator) -> ChainNoise:
    return ChainNoise.of(rng.standard_normal((DRAWS, head.chain.length + 1, head.token_dim), dtype=np.float32))


def _alone(head: Head, z: FloatArray, context: Context, rng: np.random.Generator) -> FloatArray:
    noise = _noise(head, rng)
    return head.sample(z, context.guidance, noise.start, noise.steps).path[:, -1]


def _propose(drafter: Head, context: Context, rng: np.random.Generator) -> Proposal:
    noise = _noise(drafter, rng)
    return Proposal(noise, drafter.sample(context.draft_z, context.guidance, noise.start, noise.steps))


def _exact(target: Head, drafter: Head, rng: np.random.Generator, context: Context) -> tuple[FloatArray, float]:
    proposal, n, dim = _propose(drafter, context, rng), target.chain.length, target.token_dim
    z, guidance = context.target_z, context.guidance
    means = target.means(proposal.drawn.path, z, guidance)
    judgement = judge_exact(target.chain, proposal, means, rng.random((DRAWS, n + 1)))
    token, rows = proposal.token.copy(), np.flatnonzero(~judgement.accepted)
    token[rows] = complete_exact(
        target.chain,
        proposal,
        judgement,
        rows,
        target.finish(z, guidance),
        ResidualDraws(
            coordinate=rng.random(len(rows)),
            direction=rng.standard_normal((len(rows), dim)),
            fresh=rng.standard_normal((len(rows), n, dim), dtype=np.float32),
        ),
    ).token
    return token, float(judgement.accepted.mean())


def _paper(
    target: Head, drafter: Head, rng: np.random.Generator, tau: float, context: Context
) -> tuple[FloatArray, float]:
    proposal = _propose(drafter, context, rng)
    aligned = target.sample(context.target_z, context.guidance, proposal.noise.start, proposal.noise.steps)
    judgement = judge_paper(target.chain, proposal, aligned, rng.random(DRAWS), tau)
    token, rows = proposal.token.copy(), np.flatnonzero(~judgement.accepted)
    normal = rng.standard_normal((len(rows), PAPER_TRIES, target.token_dim))
    token[rows] = complete_paper(target.chain, judgement, rows, normal, rng.random((len(rows), PAPER_TRIES))).token
    return token, float(judgement.accepted.mean())


def _apart(first: FloatArray, second: FloatArray) -> float:
    return energy_distance(torch.from_numpy(first).double(), torch.from_numpy(second).double())


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Of samples `[N, F]` and `[M, F]`; unbiased, so noise may make it negative."""
    between = torch.cdist(first, second).mean()
    return float(2 * between - torch.pdist(first).mean() - torch.pdist(second).mean())
