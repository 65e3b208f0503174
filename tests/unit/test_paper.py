"""`paper` mode draws what the published algorithm draws, written out for one image at a time."""

import numpy as np
import pytest
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import DecodeOptions
from specdec_rt.acceptance import paper_log_acceptance
from specdec_rt.decode.paper import RESIDUAL_TRIES
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import NoiseSource, TokenNoise
from specdec_rt.residual import draw_paper_residual

SEED, LABELS = 5, [3, 1, 4]
ASKED = {"digits": {}, "digits-mar": {"ar_steps": 8, "guidance": 1.0}}


def written_out(setup, image, tau):
    """`[L, D]` what the image shows: the token's own mean, or the one that it was redrawn around."""
    target, draft, plan, draws = setup.target, setup.session.draft, setup.plan, NoiseSource(SEED)
    n, dim, known, std = target.head.chain.length, target.head.token_dim, plan.schedule.known, target.head.chain.std[-1]
    order = plan.draw_order(draws, np.array([image]))
    tokens, shown = np.zeros((2, 1, plan.tokens, dim), np.float32)
    for model in (target, draft):
        model.backbone.begin(np.array([LABELS[image]]))
    ar_step = 0
    while ar_step < plan.schedule.steps:
        length, drafted, sets = min(plan.draft_length, plan.schedule.steps - ar_step), tokens.copy(), []
        for offset in range(length):
            positions = PositionBatch.of(order, known, np.array([ar_step + offset]), 1)
            noise = TokenNoise(draws, np.full(len(positions.position), image), positions.position)
            guidance, z = plan.guidance_at(positions.ar_step), draft.backbone.condition(drafted, positions)
            drawn = draft.head.sample(z, guidance, noise.chain(n, dim))
            drafted[0, positions.position] = drawn.token
            sets.append((positions.position, noise, guidance, drawn))
        z = target.backbone.condition(drafted, PositionBatch.of(order, known, np.array([ar_step]), length))
        for position, noise, guidance, drawn in sets:
            z_set, z = z[:, : len(position)], z[:, len(position) :]
            own = target.head.sample(z_set, guidance, noise.chain(n, dim))  # on the draft's noise
            q_mean, p_mean, none = drawn.mean[:, -1], own.mean[:, -1], np.zeros(len(position))
            log_acceptance = paper_log_acceptance(drawn.token, q_mean, std, p_mean, std, none, tau)
            accepted = (np.log(noise.acceptance(1)[:, 0]) < log_acceptance)[:, None]
            tries = noise.residual_tries(RESIDUAL_TRIES, dim)
            redrawn, _ = draw_paper_residual(q_mean, std, p_mean, std, none, *tries, own.token)
            tokens[0, position] = np.where(accepted, drawn.token, redrawn)
            shown[0, position] = np.where(accepted, q_mean, p_mean)
            ar_step += 1
            if not accepted.all():
                break
    return shown[0]


@pytest.mark.parametrize("tau", [1.0, 6.0])
@pytest.mark.parametrize("name", ASKED)
def test_paper_mode_is_the_published_algorithm(cpu, name, tau):
    options = DecodeOptions(mode="paper", draft="small", draft_length=3, tau=tau, prefill=0.0, **ASKED[name])
    found = cpu(name).generate(LABELS, seed=SEED, options=options)
    assert found.stats.accepted > 0
    assert found.stats.rejected > 0
    expected = written_out(cpu(name).setup(options), 1, tau)
    assert largest_difference(found.tokens[1], expected) <= SAME_TO_ROUNDING


def test_another_temperature_is_seen(cpu):
    """The comparison can fail."""
    options = DecodeOptions(mode="paper", draft="small", prefill=0.0, **ASKED["digits-mar"])
    found = cpu("digits-mar").generate(LABELS, seed=SEED, options=options)
    other = written_out(cpu("digits-mar").setup(options), 1, tau=6.0)
    assert largest_difference(found.tokens[1], other) > 0.1
