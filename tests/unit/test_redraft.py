"""Rests of chains that are drafted and judged anew: what a token may depend on, and what it saves."""

import numpy as np
import pytest
from bundles import copy_bundle, edit_manifest
from hypothesis import given
from hypothesis import strategies as st
from specdec_rt.decode.redraft import evaluations, held_factors, make_redraft

from specdec_rt import DecodeOptions, load
from specdec_rt.chain import ChainSpec, compile_chain
from specdec_rt.decode import chain, plan, redraft

LABELS = np.arange(12) % 10
CLOSE = 2e-4
"""Rounding between batch shapes may move a token by this much."""


@pytest.fixture(scope="module", params=["digits", "digits-mar"])
def pipeline(request):
    return load(request.param, backend="onnxruntime")


@pytest.fixture
def short(monkeypatch):
    """Rests are worth it from three transitions on, as the shipped chains are short."""
    monkeypatch.setattr(redraft, "LEAST", 3)


def largest_difference(first, second):
    return np.abs(first - second).max()


@given(st.data(), st.integers(1, 30))
def test_rows_evaluate_where_they_begin_and_then_where_the_draft_does(data, length):
    grid = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    begin = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4)))

    found = evaluations(begin, grid)

    assert found.shape == (grid.sum() + 2, len(begin))
    for row, first in zip(found.T, begin, strict=True):
        wanted = [first, *(step for step in np.flatnonzero(grid) if step > first)]
        assert row.tolist() == wanted + [length] * (len(row) - len(wanted))


def test_what_is_held_is_the_clean_token():
    table = compile_chain(ChainSpec(steps=30, t_max=975, final_std=0.1))
    factors, rng = held_factors(table), np.random.default_rng(0)
    state, epsilon, later = rng.normal(size=3)
    for step in (0, 7, 28):
        mean = table.state_coefficient[step] * state + table.epsilon_coefficient[step] * epsilon
        clean = table.prediction_state[step] * state + table.prediction_epsilon[step] * epsilon
        assert factors[step, 3] * state + factors[step, 4] * mean == pytest.approx(clean)
        after = step + 1
        held = (clean - table.prediction_state[after] * later) / table.prediction_epsilon[after]
        wanted = table.state_coefficient[after] * later + table.epsilon_coefficient[after] * held
        assert factors[after, 0] * later + factors[after, 1] * clean == pytest.approx(wanted)


@pytest.mark.usefixtures("short")
def test_a_rest_that_is_drafted_whole_is_what_it_would_be_step_by_step(pipeline, monkeypatch):
    """A draft that calls the head at every step is the target's own chain, on the same noise, and always accepted."""
    asked = {"seed": 3, "mode": "exact", "draft": "small", "batch_size": 6}
    monkeypatch.setattr(plan, "SELF_STEPS", 100.0)
    drafted = pipeline.generate(LABELS, **asked)
    monkeypatch.setattr(redraft, "LEAST", 1000)
    stepwise = pipeline.generate(LABELS, **asked)

    assert stepwise.stats.rejected > 50
    assert drafted.stats.sequential_head_calls == stepwise.stats.sequential_head_calls
    assert largest_difference(drafted.tokens, stepwise.tokens) <= CLOSE


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("options", [{"draft": "self", "draft_steps": 5}, {"draft": "small", "draft_length": 3}])
def test_an_image_is_the_same_alone_and_in_a_batch(pipeline, options):
    asked = {"seed": 3, "mode": "exact", **options}
    together = pipeline.generate(LABELS, **asked)
    for index in (0, 7):
        alone = pipeline.generate([LABELS[index]], indices=[index], **asked)
        assert largest_difference(alone.tokens[0], together.tokens[index]) <= CLOSE


@pytest.mark.usefixtures("short")
def test_what_does_not_fit_one_call_takes_several(pipeline, monkeypatch):
    asked = {"seed": 3, "mode": "exact", "draft": "self", "draft_steps": 5}
    together = pipeline.generate(LABELS, **asked)
    monkeypatch.setattr(chain.Head, "paths_per_call", lambda *_: 2)
    monkeypatch.setattr(chain.Head, "places", lambda *_: 3)
    made = []
    monkeypatch.setattr(redraft, "make_redraft", lambda *given: made.append(make_redraft(*given)) or made[-1])
    apart = load(pipeline.bundle.folder, backend="onnxruntime").generate(LABELS, **asked)

    assert all(each.taken is None for each in made)  # there is no modulation of the whole round
    assert max(len(each.z_rows) for each in made) > 2
    assert max(len(each.made_steps) for each in made) > 1
    assert largest_difference(apart.tokens, together.tokens) <= CLOSE


@pytest.mark.usefixtures("short")
def test_it_saves_sequential_head_calls(pipeline, monkeypatch):
    asked = {"seed": 3, "mode": "exact", "draft": "self", "draft_steps": 4}
    drafted = pipeline.generate(LABELS, **asked).stats
    monkeypatch.setattr(redraft, "LEAST", 1000)
    stepwise = pipeline.generate(LABELS, **asked).stats

    assert drafted.sequential_head_calls < 0.9 * stepwise.sequential_head_calls


@pytest.mark.parametrize("options", [{"draft": "self"}, {"draft": "small", "draft_length": 2}])
def test_a_long_chain_as_it_is(tmp_path, monkeypatch, options):
    """Nothing is bent here: the shipped pair on a chain of 60 steps."""
    folder = copy_bundle(tmp_path / "long")
    edit_manifest(folder, "chain", "steps", value=60)
    long = load(folder, backend="onnxruntime")
    asked = {"seed": 3, "mode": "exact", **options}

    found = long.generate(LABELS[:4], **asked)
    alone = long.generate(LABELS[2:3], indices=[2], **asked)
    monkeypatch.setattr(redraft, "LEAST", 1000)
    stepwise = long.generate(LABELS[:4], **asked)

    assert largest_difference(alone.tokens[0], found.tokens[2]) <= CLOSE
    evaluate = long.session(DecodeOptions(mode="exact", **options)).plan.evaluate
    of_draft = compile_chain(long.bundle.manifest.chain).length if evaluate is None else evaluate.sum()
    rests = [made.stats.sequential_head_calls - made.stats.drafted * of_draft for made in (found, stepwise)]
    assert rests[0] < 0.8 * rests[1]


def test_a_short_chain_has_no_rest_that_is_worth_it(pipeline):
    asked = pipeline.session(DecodeOptions(mode="exact"))

    assert asked.plan.grid is None
