"""How far a mode's next token is from the target's, in fixed contexts: sharper than whole images, and cheaper."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.decode.decoder import DecodingSetup
from specdec_rt.decode.head import Head
from specdec_rt.decode.paper import PaperVerifier
from specdec_rt.decode.reference import verify
from specdec_rt.decode.round import Speculation
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import NoiseSource, TokenNoise
from specdec_rt.types import FloatArray, IntArray

__all__ = ["energy_distance", "next_token_distances"]


@dataclass(frozen=True)
class Context:
    """One context, and all that R next tokens are drawn from in it."""

    keys: IntArray
    """`[R]` the context's number, which the noise is keyed by"""
    z: FloatArray
    """`[G, R, Z]` the target's condition, the same in every row"""
    draft_z: FloatArray
    """`[G, R, Z]`"""
    guidance: FloatArray
    """`[G, R]`"""

    def noise(self, seed: int) -> TokenNoise:
        """The random numbers of R tokens."""
        return TokenNoise(NoiseSource(seed), self.keys, np.arange(len(self.keys)))


Drawn = tuple[FloatArray, float | None]
"""tokens `[R, D]`, and the share of drafts accepted where there were any"""


def next_token_distances(
    pipeline: Pipeline, draft: str, taus: Sequence[float], *, contexts: int = 16, draws: int = 1000
) -> dict[str, Any]:
    """Acceptance and energy distance to the target's next token, averaged over contexts of a MAR bundle.

    Of `target` (the noise floor: another sample of the same distribution), `draft`, `exact`, and `paper`
    at each τ.
    """
    manifest = pipeline.bundle.manifest
    setup = pipeline.setup(DecodeOptions(mode="exact", draft=draft, ar_steps=manifest.tokens))
    assert setup.session.draft is not None
    target, drafter = setup.target.head, setup.session.draft.head
    modes: dict[str, Callable[[Context, TokenNoise], Drawn]] = {
        "target": lambda context, noise: (_sample(target, context.z, context.guidance, noise), None),
        "draft": lambda context, noise: (_sample(drafter, context.draft_z, context.guidance, noise), None),
        "exact": partial(_exact, target, drafter),
    }
    for tau in taus:
        verifier = PaperVerifier(setup.session, replace(setup.plan, tau=tau))
        modes[f"tau_{tau}"] = partial(_paper, target, drafter, verifier)
    found = _contexts(pipeline, setup, contexts, draws)
    wanted = [_sample(target, context.z, context.guidance, context.noise(1)) for context in found]
    figures = {}
    for seed, (name, draw) in enumerate(modes.items(), start=2):
        drawn = [draw(context, context.noise(seed)) for context in found]
        apart = [_apart(tokens, other) for (tokens, _), other in zip(drawn, wanted, strict=True)]
        accepted = [share for _, share in drawn if share is not None]
        figures[name] = {
            "acceptance_rate": float(np.mean(accepted)) if accepted else None,
            "energy_distance": float(np.mean(apart)),
        }
    return figures


def _contexts(pipeline: Pipeline, setup: DecodingSetup, contexts: int, draws: int) -> list[Context]:
    """Random positions of the target's own images, as many known as uniform chance has it."""
    manifest, rng = pipeline.bundle.manifest, np.random.default_rng(0)
    labels = np.arange(contexts) % manifest.classes
    images = pipeline.generate(labels, seed=5, mode="target").tokens
    tokens = images + manifest.chain.final_std * rng.standard_normal(images.shape, dtype=np.float32)
    order = np.stack([rng.permutation(manifest.tokens) for _ in labels])
    count = rng.integers(0, manifest.tokens, contexts)
    positions = PositionBatch.of(order, np.arange(manifest.tokens + 1), count, 1)
    given = []
    for model in setup.session.models:
        model.backbone.begin(labels)
        given.append(model.backbone.condition(tokens, positions))
    given.append(setup.plan.guidance_at(positions.ar_step))
    return [
        Context(np.full(draws, i), *(np.repeat(values[:, i : i + 1], draws, axis=1) for values in given))
        for i in range(contexts)
    ]


def _sample(head: Head, z: FloatArray, guidance: FloatArray, noise: TokenNoise) -> FloatArray:
    return head.sample(z, guidance, noise.chain(head.chain.length, head.token_dim)).token


def _exact(target: Head, drafter: Head, context: Context, noise: TokenNoise) -> Drawn:
    normals = noise.chain(target.chain.length, target.token_dim)
    drawn = drafter.sample(context.draft_z, context.guidance, normals)
    token, _, accepted = verify(target, context.z, context.guidance, drawn, normals, noise)
    return token, float(accepted.mean())


def _paper(target: Head, drafter: Head, verifier: PaperVerifier, context: Context, noise: TokenNoise) -> Drawn:
    normals, guidance = noise.chain(target.chain.length, target.token_dim), context.guidance
    drawn, own = drafter.sample(context.draft_z, guidance, normals), target.sample(context.z, guidance, normals)
    verdict = verifier.judge(Speculation(drawn, own), normals[:, 1:], noise)
    token, rows = drawn.token.copy(), np.flatnonzero(~verdict.accepted)
    token[rows] = verifier.complete(verdict, rows, guidance[:, rows], noise.pick(rows)).token
    return token, float(verdict.accepted.mean())


def _apart(first: FloatArray, second: FloatArray) -> float:
    return energy_distance(torch.from_numpy(first).double(), torch.from_numpy(second).double())


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Of samples `[N, F]` and `[M, F]`; unbiased, so noise may make it negative."""
    between = torch.cdist(first, second).mean()
    return float(2 * between - torch.pdist(first).mean() - torch.pdist(second).mean())
