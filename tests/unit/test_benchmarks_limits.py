"""What graphs must move and compute, and what a machine can."""

import pytest

from benchmarks.limits import bandwidth, graph_limits, graph_work
from export.causal import read_pair
from specdec_rt import load
from specdec_rt.bench.graph_times import graph_sizes
from specdec_rt.build.bundle_graphs import bundle_graphs


@pytest.fixture(scope="module")
def digits():
    return load("digits", backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def pair():
    return read_pair("digits")


@pytest.fixture(scope="module")
def work_of(digits, pair):
    """Counts the work of a graph of the target with two branches, x rows and y positions."""
    graphs = {graph.label: graph for graph in bundle_graphs(digits.bundle.manifest)}

    def work_of(name, x, y=1):
        return graph_work(pair, graphs[f"target.{name}"], graph_sizes(digits, branches=2, chain=23, x=x, y=y))

    return work_of


def weights_of_a_step(name):
    """Whether a denoising step multiplies with these weights of the head; else they make modulation."""
    return "adaLN_modulation" not in name and not name.startswith("cond_embed")


def test_a_denoising_step_multiplies_every_row_with_the_weights_that_no_modulation_needs(work_of, pair):
    head = {n: p for n, p in pair.target.head.named_parameters() if not n.startswith("time_embed")}
    of_step = [parameter for name, parameter in head.items() if weights_of_a_step(name)]
    products = sum(parameter.numel() for parameter in of_step if parameter.dim() == 2)

    work = work_of("denoise_step", 3)

    assert work["weight_bytes"] == 4 * sum(parameter.numel() for parameter in of_step)
    guidance = 2 * 2 * 3 * 16
    assert work["operations"] - guidance == 2 * products * 2 * 3  # two branches of three rows


def test_modulation_reads_the_other_weights_of_the_head(work_of, pair):
    head = {n: p for n, p in pair.target.head.named_parameters() if not n.startswith("time_embed")}
    others = sum(parameter.numel() for name, parameter in head.items() if not weights_of_a_step(name))

    assert work_of("modulation", 3)["weight_bytes"] == 4 * others


def test_path_means_read_weights_once_for_all_steps_of_the_chain(work_of):
    step, means = work_of("denoise_step", 3), work_of("path_means", 3)

    assert means["weight_bytes"] == step["weight_bytes"]
    assert means["operations"] == 23 * step["operations"]


def test_a_backbone_reads_weights_once_for_all_positions(work_of):
    one, four = (work_of("backbone", 1, positions) for positions in (1, 4))

    assert one["weight_bytes"] == four["weight_bytes"]
    assert four["operations"] == 4 * one["operations"]


def test_bandwidth_lies_between_what_was_measured():
    row = {"copy_bytes_per_second": 1.0}
    machine = {
        "moved": [
            {**row, "bytes": 2**20, "read_bytes_per_second": 4e9},
            {**row, "bytes": 2**22, "read_bytes_per_second": 2e9},
        ]
    }

    assert bandwidth(machine, 2**21) == pytest.approx(3e9)
    assert bandwidth(machine, 2**30) == pytest.approx(2e9)


def test_every_graph_of_a_round_is_held_against_the_limits(digits):
    machine = {
        "moved": [{"bytes": 2**20, "read_bytes_per_second": 1e10, "copy_bytes_per_second": 1e10}],
        "operations_per_second": 1e11,
    }

    rows = graph_limits(digits, machine, batch=1, branches=2, draft_length=4)

    target = [(row["graph"], row["x"], row["y"]) for row in rows if row["graph"].startswith("target.")]
    assert target == [
        ("target.backbone", 1, 1),
        ("target.backbone", 1, 4),
        ("target.modulation", 1, 23),
        ("target.denoise_step", 1, 1),
        ("target.path_means", 4, 1),
    ]
    assert all(row["share_of_limit"] > 0 and row["bound"] in ("bytes", "operations") for row in rows)
