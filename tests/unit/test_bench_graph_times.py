"""Times of calls, made up of measurements of single graphs."""

import pytest
from bench_workloads import manifest_of

from specdec_rt import load
from specdec_rt.bench.graph_times import GraphClock, GraphTimes
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.capacity import Capacity
from specdec_rt.manifest import GraphName

CHAIN, BRANCHES = 23, 2
WIDTH = manifest_of("digits").target.modulation_width


def graph_times(measure, *, capacity=None, draft_share=None):
    return GraphTimes(
        manifest_of("digits"),
        measure,
        branches=BRANCHES,
        chain=CHAIN,
        capacity=capacity or Capacity(),
        draft_share=draft_share,
    )


def test_a_chain_finds_weights_in_the_cache_from_its_second_step_on():
    times = graph_times(lambda *call: 2.0 if call[-1] else 5.0)

    assert times.denoise_steps("target", 1, 1) == 5.0
    assert times.denoise_steps("target", 1, 23) == 5.0 + 22 * 2.0


def test_a_draft_that_does_not_exist_takes_its_share_of_the_targets_time():
    times = graph_times(lambda *_: 8.0, draft_share=0.25)

    assert (times.backbone("draft", 1, 1), times.backbone("target", 1, 1)) == (2.0, 8.0)


def test_modulation_is_made_of_as_many_steps_at_a_time_as_fit():
    asked = []

    def measure(graph, *sizes):
        asked.append((graph.label, *sizes))
        return 1.0

    capacity = Capacity(modulation_values=2 * 4 * 8 * WIDTH)
    assert graph_times(measure, capacity=capacity).modulation("target", 4, 20) == 3.0
    assert set(asked) == {("target.modulation", 4, 8, False), ("target.modulation", 4, 4, False)}


def test_path_means_are_made_of_as_many_tokens_at_a_time_as_fit():
    capacity = Capacity(states_per_call=BRANCHES * CHAIN * 4)

    assert graph_times(lambda *_: 1.0, capacity=capacity).path_means(10, CHAIN) == 3.0


def test_path_means_cost_in_proportion_to_their_transitions():
    times = graph_times(lambda _, x, y, __: float(x * y))

    assert times.path_means(6, CHAIN) == 6.0
    assert times.path_means(6, 9) == pytest.approx(6.0 * 9 / CHAIN)
    assert times.path_means(6, 0) == 0.0


def test_nothing_is_measured_twice_and_all_of_it_is_recorded():
    asked = []

    def measure(graph, *_):
        asked.append(graph.label)
        return 1.0

    times = graph_times(measure)
    for _ in range(2):
        times.backbone("adapter", 2, 1)
        times.denoise_steps("target", 2, 5)

    assert sorted(asked) == ["adapter.backbone", "target.denoise_step", "target.denoise_step"]
    point = [{"x": 2, "y": 1, "seconds": 1.0}]
    assert times.record() == {
        "adapter.backbone": point,
        "target.denoise_step": point,
        "target.denoise_step, again": point,
    }


@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_every_graph_of_decoding_is_called_on_the_clock(name):
    clock = GraphClock(
        load(name, backend="onnxruntime", threads=1), branches=BRANCHES, chain=CHAIN, capacity=Capacity()
    )
    for graph in bundle_graphs(manifest_of(name)):
        if graph.name not in (None, GraphName.TIME_EMBEDDING):
            assert 0 < clock(graph, 2, 3 if graph.name is GraphName.MODULATION else 1, False) < 1, graph.label
