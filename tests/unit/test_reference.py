"""The decoder draws what the algorithm on one page draws, whatever the draft, its length and the batch."""

from dataclasses import dataclass

import numpy as np
import pytest
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.decode.reference import decode_exact
from specdec_rt.noise import NoiseSource, Purpose
from specdec_rt.plan import Tuning

SEED = 7
LABELS = [3, 1, 4, 7, 9, 0, 5]
COMPARED = [0, 5]
"""Images that are drawn by the reference, too."""
DRAFTS = {
    "adapter": {"draft": "adapter", "draft_length": 4},
    "small": {"draft": "small", "draft_length": 3},
    "self": {"draft": "self"},
    "adapter on few steps": {"draft": "adapter", "draft_length": 1, "draft_steps": 12},
    "small on few steps": {"draft": "small", "draft_length": 4, "draft_steps": 8},
    "self on few steps": {"draft": "self", "draft_steps": 5},
}
RESUMES = Tuning(min_resume_steps=3)
"""The shipped chains are too short for a rejected token's chain to be drafted again; with this it is."""
AR_STEPS = {"digits": 49, "digits-mar": 5}


@pytest.fixture(scope="module")
def pipelines():
    """Two of each bundle: as it ships, and one that resumes speculation."""
    return {
        (name, tuning): Pipeline(load_bundle(name), OnnxRuntimeBackend(threads=1), tuning=tuning)
        for name in AR_STEPS
        for tuning in (None, RESUMES)
    }


def options_of(name, draft):
    return DecodeOptions(mode="exact", ar_steps=AR_STEPS[name], **DRAFTS[draft])


def on_one_page(pipeline, options, key, draws):
    """`[L, D]` the image with this key by the reference."""
    setup = pipeline.setup(options)
    draft = setup.session.draft or setup.target
    return decode_exact(setup.target, draft, setup.plan, draws, key, LABELS[key])


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tuning", [None, RESUMES], ids=["chains finished", "chains drafted again"])
@pytest.mark.parametrize("name", AR_STEPS)
def test_the_decoder_draws_what_the_reference_draws_alone_and_in_a_batch(pipelines, name, tuning, draft):
    pipeline, options = pipelines[name, tuning], options_of(name, draft)
    together = pipeline.generate(LABELS, seed=SEED, options=options, batch_size=len(LABELS))
    assert together.stats.rejected > 0
    for key in COMPARED:
        alone = pipeline.generate([LABELS[key]], seed=SEED, options=options, indices=[key])
        expected = on_one_page(pipeline, options, key, NoiseSource(SEED))
        print("DIFF", largest_difference(alone.tokens[0], expected), largest_difference(together.tokens[key], expected))
        assert largest_difference(alone.tokens[0], expected) <= SAME_TO_ROUNDING
        assert largest_difference(together.tokens[key], expected) <= SAME_TO_ROUNDING
