import json
import re

import numpy as np
import onnx
import pytest

from benchmarks import int8_draft as int8_draft_module
from benchmarks import published_head as published_head_module
from benchmarks import report, requests, run
from benchmarks.__main__ import main
from benchmarks.int8_draft import int8_draft
from benchmarks.limits import bandwidth, graph_work
from benchmarks.observe import observe
from benchmarks.published_head import published_head
from benchmarks.report import write_report
from benchmarks.requests import Request, forced_verdicts, labels_of
from benchmarks.run import Results, write_json
from benchmarks.scenario import SCENARIOS, Forced, read_scenario
from benchmarks.worker import Job, Measured, perform
from export.causal import read_pair
from specdec_rt import load
from specdec_rt.bench.graph_times import graph_sizes
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.bundle import load_bundle
from specdec_rt.config import DecodeOptions
from specdec_rt.errors import OutputError, UsageError
from specdec_rt.manifest import WEIGHTS_KEY, GraphName

SCENARIO = """
title = "a test"
bundle = "digits-mar"
ar_steps = 3
batches = [1]
warmup = 1
samples = 2
repeats = 1

[[variants]]
name = "target"
engine = "runtime"
options = { mode = "target" }

[[variants]]
name = "fewer"
engine = "runtime"
options = { mode = "target", ar_steps = 2 }

[[variants]]
name = "exact, self"
engine = "runtime"
options = { mode = "exact", draft = "self" }
observe = true

[[variants]]
name = "eager"
engine = "torch"
style = "eager"
"""


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "test.toml"
    path.write_text(SCENARIO)
    return read_scenario(str(path))[1]


@pytest.fixture(scope="module")
def digits_mar():
    return load("digits-mar", backend="onnxruntime", threads=1)


@pytest.mark.parametrize("name", sorted(path.stem for path in SCENARIOS.glob("*.toml")))
def test_every_scenario_is_valid_and_has_a_baseline_and_the_target(name):
    _, found = read_scenario(name)

    assert {variant.engine for variant in found.variants} == {"torch", "runtime"}
    assert "target" in {variant.name for variant in found.variants}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("repeats = 1", "repeat = 1", "repeat"),
        ('style = "eager"', 'style = "fast"', "style"),
        ('{ mode = "target" }', '{ mod = "target" }', "mod"),
        ('name = "fewer"', 'name = "target"', "two variants"),
        ('bundle = "digits-mar"', "", "bundle or random_mar"),
        (
            'bundle = "digits-mar"',
            'random_mar = "mar_base"\nint8_draft = "small"',
            "int8_draft is given without bundle",
        ),
        ('bundle = "digits-mar"', 'bundle = "digits-mar"\nforced_source = "a guess"', "forced_source says"),
        ("options = {", 'beside = "targt"\noptions = {', "beside 'targt'"),
        ('draft = "self" }', 'draft = "self" }\npublished_head = true', "published_head, which is for mode 'target'"),
        ("samples = 2", "samples = ", "TOML"),
    ],
)
def test_what_a_scenario_says_wrong_is_named(tmp_path, old, new, said):
    path = tmp_path / "test.toml"
    path.write_text(SCENARIO.replace(old, new, 1))

    with pytest.raises(UsageError, match=said):
        read_scenario(str(path))


def test_only_the_targets_own_distribution_counts_as_exact(scenario):
    exact = {variant.name: variant.distribution(scenario)[0] for variant in scenario.variants}

    assert exact == {"target": True, "fewer": False, "exact, self": True, "eager": True}


def test_a_request_may_end_after_its_first_ar_steps(digits_mar):
    told = []
    request = Request(DecodeOptions(mode="target", ar_steps=6), 2, first_ar_steps=2)
    generate = digits_mar.generate

    class Watched:
        bundle = digits_mar.bundle

        def generate(self, labels, progress, **named):
            def tell(done, total):
                told.append(done)
                progress(done, total)

            return generate(labels, progress=tell, **named)

    assert request(Watched(), 1) is None
    known = requests.request_schedule(digits_mar, request.options).known
    assert told == [2 * known[1], 2 * known[2]]


def test_forced_verdicts_have_the_acceptance_that_is_forced(digits_mar):
    labels = labels_of(digits_mar, 1, 10)
    asked = {"seed": 1, "mode": "exact", "draft": "self", "ar_steps": 4}
    with forced_verdicts(Forced(acceptance=0.25, left=0.5, resumed=0.5)):
        forced = digits_mar.generate(labels, **asked)

    assert abs(forced.stats.acceptance_rate - 0.25) < 0.05
    assert np.isfinite(forced.tokens).all()
    assert digits_mar.generate(labels, **asked).stats.acceptance_rate > 0.5


@pytest.mark.parametrize("options", [{"mode": "exact"}, {"mode": "exact", "draft": "self"}, {"mode": "paper"}])
def test_observed_verdicts_are_those_that_the_figures_count(digits_mar, options):
    request = Request(DecodeOptions(**options, ar_steps=8), 3)

    stats = request(digits_mar, 1)
    observed = observe(digits_mar, request, seed=1, requests=1).as_dict()

    assert observed["judged"] == stats.accepted + stats.rejected
    assert observed["acceptance_rate"] == stats.acceptance_rate
    assert sum(row["judged"] for row in observed["by_step"]) == observed["judged"]


def test_work_of_a_graph_is_counted_from_its_modules():
    pipeline = load("digits", backend="onnxruntime", threads=1)
    pair = read_pair("digits")
    slots = {slot.label: slot for slot in bundle_graphs(pipeline.bundle.manifest)}
    head = pair.target.head
    parameters = {n: p for n, p in head.named_parameters() if not n.startswith("time_embed")}
    of_step = {n: p for n, p in parameters.items() if "adaLN_modulation" not in n and not n.startswith("cond_embed")}
    products = sum(p.numel() for p in of_step.values() if p.dim() == 2)

    work = {
        name: graph_work(pair, slots[f"target.{name}"], graph_sizes(pipeline, branches=2, chain=23, x=3, y=1))
        for name in ("denoise_step", "modulation", "path_means")
    }

    assert work["denoise_step"]["weight_bytes"] == 4 * sum(p.numel() for p in of_step.values())
    assert work["denoise_step"]["operations"] - 2 * 2 * 3 * 16 == 2 * products * 2 * 3  # two branches of three rows
    of_condition = [p.numel() for n, p in parameters.items() if n not in of_step]
    assert work["modulation"]["weight_bytes"] == 4 * sum(of_condition)
    assert work["path_means"]["weight_bytes"] == work["denoise_step"]["weight_bytes"]
    assert work["path_means"]["operations"] == 23 * work["denoise_step"]["operations"]
    one, four = (
        graph_work(pair, slots["target.backbone"], graph_sizes(pipeline, branches=2, chain=23, x=1, y=y))
        for y in (1, 4)
    )
    assert one["weight_bytes"] == four["weight_bytes"]
    assert four["operations"] == 4 * one["operations"]


@pytest.fixture(scope="module")
def with_int8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "digits"
    assert int8_draft("digits", "adapter", folder)
    return folder


def test_an_int8_draft_drafts_as_well_as_what_it_is_made_of(with_int8):
    pipeline = load(with_int8, backend="onnxruntime", threads=1)

    def made(draft):
        return pipeline.generate([1, 2, 3, 4], seed=1, mode="exact", draft=draft, draft_length=4, draft_steps=12)

    of_float, of_int8 = made("adapter"), made("adapter-int8")

    assert of_int8.tokens.shape == (4, 49, 16)
    assert np.isfinite(of_int8.tokens).all()
    assert of_int8.stats.acceptance_rate > 0.8 * of_float.stats.acceptance_rate
    assert not np.array_equal(of_int8.tokens, of_float.tokens)


def test_weights_of_an_int8_draft_are_int8_and_the_rest_is_its_sources(with_int8):
    pipeline = load(with_int8, backend="onnxruntime", threads=1)
    manifest, plain = pipeline.bundle.manifest, load_bundle("digits").manifest
    record, head = manifest.drafts["adapter-int8"], manifest.target
    step = onnx.load(pipeline.bundle.path(record.graphs[GraphName.DENOISE_STEP]))
    source = onnx.load(pipeline.bundle.path(head.graphs[GraphName.DENOISE_STEP]), load_external_data=False)
    sizes = dict.fromkeys(onnx.TensorProto.DataType.values(), 0)
    for tensor in step.graph.initializer:
        sizes[tensor.data_type] += int(np.prod(tensor.dims))
    others = set(record.graphs) - {GraphName.BACKBONE, GraphName.DENOISE_STEP}

    assert sum(node.op_type == "MatMulInteger" for node in step.graph.node) == 6
    assert sizes[onnx.TensorProto.INT8] >= 6 * 256 * 256
    assert sizes[onnx.TensorProto.FLOAT] < 2 * 16 * 256 + 7000  # the ends, biases and norms
    weights = [{entry.key: entry.value for entry in model.metadata_props} for model in (step, source)]
    assert weights[0] == weights[1]
    assert set(weights[0]) == {WEIGHTS_KEY}
    assert all(record.graphs[name] == head.graphs[name] for name in others)
    assert record.graphs[GraphName.BACKBONE] == manifest.drafts["adapter"].graphs[GraphName.BACKBONE]
    pair = read_pair("digits")
    parameters = sum(p.numel() for part in (pair.drafts["adapter"], pair.target.head) for p in part.parameters())
    assert record.parameters == parameters
    assert manifest.drafts == {**plain.drafts, "adapter-int8": record}


def test_an_int8_draft_is_made_again_only_when_it_would_be_another(with_int8, monkeypatch):
    assert not int8_draft("digits", "adapter", with_int8)
    monkeypatch.setattr(int8_draft_module, "_write", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(int8_draft_module, "PER_CHANNEL", not int8_draft_module.PER_CHANNEL)
    with pytest.raises(pytest.fail.Exception, match="written"):
        int8_draft("digits", "adapter", with_int8)


def test_what_cannot_become_an_int8_draft_is_named(with_int8, tmp_path, capsys):
    (tmp_path / "other").write_text("a file")

    with pytest.raises(UsageError, match=r"no draft 'large'; expected one of its drafts \(adapter, small\)"):
        int8_draft("digits", "large", tmp_path / "new")
    with pytest.raises(UsageError, match="has a draft 'adapter-int8' already"):
        int8_draft(with_int8, "adapter", tmp_path / "new")
    with pytest.raises(UsageError, match="is the bundle itself"):
        int8_draft(with_int8, "small", with_int8)
    with pytest.raises(OutputError, match="holds something that is no bundle"):
        int8_draft("digits", "adapter", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert int8_draft_module.main(["digits", "large", str(tmp_path / "new")]) == 2
    assert "no draft 'large'" in capsys.readouterr().err


def test_torch_and_limits_get_the_bundle_without_the_int8_draft(tmp_path, monkeypatch, scenario):
    asked = []

    def perform_none(job, threads):  # noqa: ARG001  # as it is called
        asked.append(job)
        return {"seconds": [1.0], "stats": {}, "left": 0.5}

    monkeypatch.setattr(run, "WORK", tmp_path)
    monkeypatch.setattr(run, "_perform", perform_none)
    scenario = scenario.model_copy(update={"bundle": "digits", "int8_draft": "adapter"})
    run.run_scenario("test", scenario, out=tmp_path / "out.json", threads=1, argv=[])

    drafted = str(tmp_path / "digits-adapter-int8_draft")
    assert "adapter-int8" in load_bundle(drafted).manifest.drafts
    of_torch = [job.bundle for job in asked if job.kind == "limits" or (job.variant and job.variant.engine == "torch")]
    assert of_torch == ["digits", "digits"]
    assert {job.bundle for job in asked} == {"digits", drafted}


@pytest.mark.parametrize("bundle", ["digits", "digits-mar"])
def test_a_head_as_published_draws_the_same_tokens_with_all_of_its_weights_in_a_step(bundle, tmp_path, capsys):
    out = tmp_path / "published"

    assert published_head_module.main([bundle, str(out)]) == 0
    assert not published_head(bundle, out)

    asked = {"labels": [3, 1], "seed": 5, "mode": "target"}
    plain, published = (load(each, backend="onnxruntime", threads=1) for each in (bundle, out))
    np.testing.assert_allclose(published.generate(**asked).tokens, plain.generate(**asked).tokens, atol=5e-3)
    weights = {
        name: {
            prop.key: prop.value
            for prop in onnx.load(
                pipeline.bundle.folder / f"target.{name}.onnx", load_external_data=False
            ).metadata_props
        }[WEIGHTS_KEY]
        for pipeline, name in ((plain, "denoise_step"), (plain, "modulation"))
    }
    of_step = onnx.load(out / "target.denoise_step.onnx", load_external_data=False)
    inside = int({prop.key: prop.value for prop in of_step.metadata_props}[WEIGHTS_KEY])
    assert inside > int(weights["denoise_step"]) + 0.8 * int(weights["modulation"])
    assert published_head_module.main([str(out), str(out)]) == 2
    assert "is the bundle itself" in capsys.readouterr().err


def test_a_variant_with_a_published_head_gets_the_bundle_that_has_one(tmp_path, monkeypatch, scenario):
    asked = []

    def perform_none(job, threads):  # noqa: ARG001  # as it is called
        asked.append(job)
        return {"seconds": [1.0], "stats": {}, "left": 0.5}

    monkeypatch.setattr(run, "WORK", tmp_path)
    monkeypatch.setattr(run, "_perform", perform_none)
    variants = [
        variant.model_copy(update={"published_head": True}) if variant.name == "target" else variant
        for variant in scenario.variants
    ]
    run.run_scenario(
        "test", scenario.model_copy(update={"variants": tuple(variants)}), out=tmp_path / "out.json", threads=1, argv=[]
    )

    published = str(tmp_path / "digits-mar-published_head")
    assert load_bundle(published).manifest.drafts == {}
    assert {job.variant.name for job in asked if job.bundle == published} == {"target"}
    predicted = [case.variant for job in asked if job.kind == "cost" for case in job.measured]
    assert predicted == ["fewer", "exact, self"]


def test_requests_by_turns_are_compared_in_pairs(tmp_path, scenario):
    target, fewer = scenario.variants[:2]
    fewer = fewer.model_copy(update={"beside": "target"})
    scenario = scenario.model_copy(update={"variants": (target, fewer), "samples": 3})
    results = Results(tmp_path / "test.json", "test", scenario, 1, machine={**MACHINE})

    found = perform(Job(kind="time", scenario=scenario, bundle="digits-mar", threads=1, variant=fewer, batch=1))
    row = results.add(fewer, 1, found)

    assert len(found["seconds"]) == len(found["beside_seconds"]) == len(row["beside_ratios"]) == 3
    assert row["beside_ratios"][0] == found["beside_seconds"][0] / found["seconds"][0]
    results.cost = {"rows": []}
    results.write()
    write_report([tmp_path / "test.json"], tmp_path / "docs")
    assert "| fewer | target | 1 |" in (tmp_path / "docs" / "benchmarks.md").read_text()


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


def test_results_become_a_report(tmp_path, scenario):
    out = tmp_path / "test.json"
    results = Results(out, "test", scenario, 1, machine={**MACHINE})
    for variant in scenario.variants:
        job = Job(
            kind="time", scenario=scenario, bundle="digits-mar", threads=1, variant=variant, batch=1, profiled=True
        )
        row = results.add(variant, 1, perform(job))
        if variant.name == "exact, self":
            row["observed"] = perform(job.model_copy(update={"kind": "observe", "observed_images": 2}))
    case = Measured(variant="exact, self", batch=1, acceptance=None, left=None, resumed=None)
    results.cost = perform(Job(kind="cost", scenario=scenario, bundle="digits-mar", threads=1, measured=(case,)))
    results.write()

    written = write_report([out], tmp_path / "docs")

    assert {path.name for path in written} == {
        "benchmarks.md",
        *(f"benchmarks-test-{kind}.png" for kind in ("latency", "acceptance", "time")),
    }
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| exact, self |" in text
    assert "**no** | another: 2 AR steps" in text
    assert re.search(r"[01] of 1 within 15%", text)
    assert json.loads(out.read_text())["rows"][0]["samples"] == 2


MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "memory_bytes": 2**30,
    "versions": {"numpy": "2"},
    "commit": None,
    "dirty": None,
    "command": "python -m benchmarks run test",
    "load_average": 0.0,
}


def test_an_ablation_begins_with_its_first_thing():
    def row(name, batch, adds):
        return {"variant": name, "batch": batch, "adds": adds, "p50_seconds": 1.0}

    rows = [row("a", 1, "first"), row("b", 1, "second"), row("b", 2, "second"), row("c", 2, "third")]

    (only,) = report._ablation(rows)
    assert only.startswith("### Ablation, batch 1\n")
    assert "| second | b |" in only
    assert report._ablation([row("b", 2, "")]) == []


def test_a_file_of_something_else_is_no_result(tmp_path, capsys):
    path = tmp_path / "other.json"
    write_json(path, {"rows": []})

    assert main(["report", str(path), "--out", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
