"""Resumed speculation: what is left of a rejected token's chain is drafted and judged in its turn."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from bundles import copy_bundle, edit_manifest
from decoding import decode, with_session
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.capacity import Capacity
from specdec_rt.decode.session import Session
from specdec_rt.noise import NoiseSource
from specdec_rt.plan import Tuning

LABELS = np.arange(8)
RESUMES = Tuning(min_resume_steps=3)
"""The shipped chains of 23 transitions are too short for it to pay."""
STEP_BY_STEP = Tuning(min_resume_steps=1000)


@pytest.fixture(scope="module", params=["digits", "digits-mar"])
def draw(request, cpu):
    """Makes a request of a bundle with some tuning."""

    def generate(tuning, labels=LABELS, **options):
        few = {"ar_steps": 8} if request.param == "digits-mar" else {}
        asked = {"seed": 3, "mode": "exact", "guidance": 1.0, **few, **options}
        return cpu(request.param, tuning).generate(labels, **asked)

    return generate


def test_a_suffix_that_is_drafted_at_every_step_is_the_targets_own(draw):
    """It is drawn on the noise that the target would finish the chain with, and always accepted."""
    every_step = replace(RESUMES, self_draft_calls=100.0)
    drafted, stepwise = (draw(tuning, draft="small", batch_size=6) for tuning in (every_step, STEP_BY_STEP))
    assert stepwise.stats.rejected > 50
    assert drafted.stats.sequential_head_calls == stepwise.stats.sequential_head_calls
    assert largest_difference(drafted.tokens, stepwise.tokens) <= SAME_TO_ROUNDING


@pytest.mark.parametrize("options", [{"draft": "self", "draft_steps": 5}, {"draft": "small", "draft_length": 3}])
def test_an_image_is_the_same_alone_and_in_a_batch(draw, options):
    together = draw(RESUMES, **options)
    alone = draw(RESUMES, LABELS[7:], indices=[7], **options)
    assert largest_difference(alone.tokens[0], together.tokens[7]) <= SAME_TO_ROUNDING


@dataclass(eq=False, kw_only=True)
class CountingSession(Session):
    """Counts the suffixes that are drafted at a time."""

    resumed: list[int] = field(default_factory=list)

    def resume(self, left):
        """As in `Session`."""
        self.resumed.append(len(left.rows))
        return super().resume(left)


def test_suffixes_that_do_not_fit_one_call_take_several(cpu):
    options = DecodeOptions(mode="exact", draft="self", draft_steps=5, ar_steps=8)
    width, transitions = 2816, 23
    small = replace(RESUMES, capacity=Capacity(modulation_values=2 * width * transitions * 4))
    setups = [with_session(cpu("digits-mar", tuning).setup(options), CountingSession) for tuning in (RESUMES, small)]
    together, apart = (decode(setup, LABELS, NoiseSource(3)).tokens for setup in setups)
    at_a_time = [setup.target.head.paths_per_call(2) for setup in setups]
    assert at_a_time[1] == 4
    assert 4 < max(setups[1].session.resumed) <= at_a_time[0]
    assert largest_difference(apart, together) <= SAME_TO_ROUNDING


def test_it_saves_sequential_head_calls(draw):
    drafted, stepwise = (draw(tuning, draft="self", draft_steps=4).stats for tuning in (RESUMES, STEP_BY_STEP))
    assert drafted.sequential_head_calls < 0.9 * stepwise.sequential_head_calls


@pytest.mark.parametrize("options", [{"draft": "self"}, {"draft": "small", "draft_length": 2}])
def test_a_long_chain_resumes_without_being_tuned_to(tmp_path, options):
    """The shipped pair, on a chain of 60 steps."""
    folder = copy_bundle(tmp_path / "long")
    edit_manifest(folder, "chain", "steps", value=60)
    bundle = load_bundle(folder)
    shipped, tuned = (Pipeline(bundle, OnnxRuntimeBackend(threads=1), tuning=each) for each in (None, STEP_BY_STEP))
    asked = {"seed": 3, "mode": "exact", "guidance": 1.0, **options}

    found = shipped.generate(LABELS[:3], **asked)
    alone = shipped.generate(LABELS[2:3], indices=[2], **asked)
    stepwise = tuned.generate(LABELS[:3], **asked)

    assert largest_difference(alone.tokens[0], found.tokens[2]) <= SAME_TO_ROUNDING
    plan = shipped.setup(DecodeOptions(**{name: value for name, value in asked.items() if name != "seed"})).plan
    calls = 58 if plan.draft_step_mask is None else plan.draft_step_mask.sum()
    completions = [made.stats.sequential_head_calls - made.stats.drafted * calls for made in (found, stepwise)]
    assert completions[0] < 0.8 * completions[1]


@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_a_short_chain_is_finished_step_by_step(cpu, name):
    assert cpu(name).setup(DecodeOptions(mode="exact")).plan.resume_step_mask is None
