"""Exact speculative decoding of one image, on one page. All else in `decode/` does the same, batched and recorded.

It is mode `exact` with a fixed draft length, for every family and every kind of draft.

Prior art: block verification (Sun et al., arXiv 2403.10444), speculative sampling of diffusion chains (De Bortoli et
al., arXiv 2501.05370), block verification along them (Soen et al., arXiv 2606.13426). docs/algorithm.md derives it.
"""

import numpy as np

from specdec_rt.acceptance import block_verify
from specdec_rt.decode.head import Head, Trajectory
from specdec_rt.decode.model import Model
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import Draws, TokenNoise
from specdec_rt.plan import Plan
from specdec_rt.residual import draw_block_residual
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["decode_exact", "verify"]


def decode_exact(target: Model, draft: Model, plan: Plan, draws: Draws, image: int, label: int) -> FloatArray:
    """The tokens to show `[L, D]` of the image whose noise has the key `image`; a self-draft is the target itself."""
    n, dim, known = target.head.chain.length, target.head.token_dim, plan.schedule.known
    order = plan.draw_order(draws, np.array([image]))
    tokens = np.zeros((1, plan.tokens, dim), np.float32)  # what is fed back: the chains' last states
    shown = np.zeros_like(tokens)  # the same, or the means around which those were drawn (`plan.emit_mean`)
    for model in (target, draft):
        model.backbone.begin(np.array([label]))
    ar_step = 0
    while ar_step < plan.schedule.steps:
        length = min(plan.draft_length, plan.schedule.steps - ar_step)
        # 1. The draft proposes set after set of tokens; each set is drawn in the light of those before it.
        drafted, sets = tokens.copy(), []
        for offset in range(length):
            positions = PositionBatch.of(order, known, np.array([ar_step + offset]), 1)
            token_noise = TokenNoise(draws, np.full(len(positions.position), image), positions.position)
            normals, guidance = token_noise.chain(n, dim), plan.guidance_at(positions.ar_step)
            z = draft.backbone.condition(drafted, positions)
            drawn = draft.head.sample(z, guidance, normals, step_mask=plan.draft_step_mask)
            drafted[0, positions.position] = drawn.token
            sets.append((positions.position, token_noise, normals, guidance, drawn))
        # 2. The target's backbone sees all drafted tokens in one call.
        z = target.backbone.condition(drafted, PositionBatch.of(order, known, np.array([ar_step]), length))
        # 3. Keep set after set. In the first one with a rejection redraw the rejected tokens, and drop what follows.
        for position, token_noise, normals, guidance, drawn in sets:
            z_set, z = z[:, : len(position)], z[:, len(position) :]
            token, mean, accepted = verify(target.head, z_set, guidance, drawn, normals, token_noise, plan)
            tokens[0, position], shown[0, position] = token, (mean if plan.emit_mean else token)
            ar_step += 1
            if not accepted.all():
                break
    return np.asarray(shown[0])


def verify(
    target: Head,
    z: FloatArray,
    guidance: FloatArray,
    drawn: Trajectory,
    normals: FloatArray,
    token_noise: TokenNoise,
    plan: Plan | None = None,
    *,
    begin: IntArray | None = None,
    attempt: int = 0,
) -> tuple[FloatArray, FloatArray, BoolArray]:
    """R tokens of the target's own distribution, their means `[R, D]`, and `[R]` whether they are the drafted ones.

    The drafts `drawn` from `normals [R, n + 1, D]` begin before transition `begin [R]` of their chains (default: the
    first). `z [G, R, Z]` and `guidance [G, R]` are the target's. Without a `plan` chains are not resumed.
    """
    n, std = target.chain.length, target.chain.std
    begin = np.zeros(len(normals), np.int64) if begin is None else begin
    target_mean = target.means(drawn.path, z, guidance)  # at the drafted states, in one call
    # Before a suffix begins both means are the same, so that the weight is 1 where it begins.
    target_mean = np.where((np.arange(n) < begin[:, None])[..., None], drawn.mean, target_mean)
    uniform = token_noise.acceptance(n + 1, attempt)
    verdict = block_verify(normals[:, 1:], drawn.mean, target_mean, std, uniform)
    token, mean, accepted = drawn.token.copy(), target_mean[:, -1].copy(), verdict.accepted_steps == n

    # Where a chain is rejected, its next state comes from the residual; fresh noise leads on from there.
    rows = np.flatnonzero(~accepted)
    step, rows_noise = verdict.accepted_steps[rows], token_noise.pick(rows)
    mean[rows] = target_mean[rows, step]
    residual_draws = rows_noise.residual(target.token_dim, attempt)
    q_mean, log_weight = drawn.mean[rows, step], verdict.log_weight[rows]
    token[rows] = draw_block_residual(q_mean, mean[rows], std[step], log_weight, *residual_draws)
    fresh = np.concatenate([token[rows][:, None], rows_noise.completion(n, target.token_dim, attempt)], axis=1)
    # The target finishes the chain at every step; or it drafts a long one on few steps, and judges that draft too.
    mask = None if plan is None else plan.resume_step_mask
    resumed = n - step - 1 >= (n if plan is None or mask is None else plan.min_resume_steps)
    for part, step_mask in ((~resumed & (step + 1 < n), None), (resumed, mask)):
        if part.any():
            at, z_part, guidance_part = rows[part], z[:, rows[part]], guidance[:, rows[part]]
            left = target.sample(z_part, guidance_part, fresh[part], begin=step[part] + 1, step_mask=step_mask)
            token[at], mean[at] = left.token, left.mean[:, -1]
            if step_mask is not None:
                token[at], mean[at], _ = verify(
                    target, z_part, guidance_part, left, fresh[part], token_noise.pick(at), plan,
                    begin=step[part] + 1, attempt=attempt + 1,
                )  # fmt: skip
    return token, mean, accepted
