"""`load` and `generate` refuse what they cannot do, before any engine runs, and say what they expected."""

import numpy as np
import pytest
from bundles import copy_bundle, edit_manifest

import specdec_rt
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.errors import ChainError, SpecDecError, UsageError


@pytest.fixture(scope="module")
def pipeline(cpu):
    return cpu("digits")


class Idle(OnnxRuntimeBackend):
    """Must not be asked for any engine."""

    def load(self, path):
        """As in `Backend`."""
        pytest.fail(f"an engine was made of {path}")


@pytest.fixture(scope="module")
def idle():
    return specdec_rt.Pipeline(load_bundle("digits"), Idle())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend": "cuda9"}, "backend is 'cuda9'; expected one of auto, tensorrt-rtx, tensorrt, cuda, onnxruntime"),
        ({"backend": ""}, "backend is ''; expected one of auto"),
        ({"threads": 0}, "threads is 0; expected"),
        ({"threads": -2}, "threads is -2; expected"),
    ],
)
def test_load_refuses(arguments, said):
    with pytest.raises(UsageError) as caught:
        specdec_rt.load("digits", **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], "labels is empty; expected at least one"),
        ([10], "labels holds 10; expected 0 to 9"),
        ([3, -1], "labels holds -1; expected 0 to 9"),
        ([1.5], "expected a list of whole numbers"),
        (["3"], "expected a list of whole numbers"),
        ("3", "labels is '3'; expected a list of whole numbers"),
        (3, "labels is 3; expected a list of whole numbers"),
        (None, "labels is None; expected a list of whole numbers"),
        (np.array([[1, 2]]), "expected a list of whole numbers"),
        (np.array([1.0]), "expected a list of whole numbers"),
    ],
)
def test_labels_that_are_none_are_refused(idle, labels, said):
    with pytest.raises(UsageError) as caught:
        idle.generate(labels)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "fast"}, "mode is 'fast'; expected one of exact, paper, target, draft"),
        ({"draft_length": -1}, "draft_length is -1; expected a whole number of at least 1"),
        ({"draft_length": 0}, "draft_length is 0; expected"),
        ({"draft_steps": 0}, "draft_steps is 0; expected"),
        ({"draft_steps": 1000}, "draft_steps is 1000; the chain has"),
        ({"ar_steps": 0}, "ar_steps is 0; expected"),
        ({"ar_steps": 7}, "ar_steps is 7; a causal family makes one token per step, so 49 here"),
        ({"tau": 0}, "tau is 0; expected a number above 0"),
        ({"tau": -1.0}, "tau is -1.0; expected"),
        ({"tau": float("nan")}, "tau is nan; expected"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"prefill": 1.5}, "prefill is 1.5; expected a share from 0 to 1"),
        ({"prefill": float("nan")}, "prefill is nan; expected"),
        ({"guidance": -0.5}, "guidance is -0.5; expected a number from 0"),
        ({"guidance": float("inf")}, "guidance is inf; expected"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule is 'cosine'; expected one of linear, constant"),
        ({"draft": "nobody"}, "draft is 'nobody'; bundle 'digits' has adapter, small, self"),
        ({"draft": "self", "mode": "draft"}, "take one of the drafts adapter, small, or mode 'exact'"),
        ({"draft": "self", "mode": "paper"}, "draft 'self' has no model of its own"),
        ({"draft": "self", "draft_length": 2}, "draft_length is 2; draft 'self' proposes 1 AR step per round"),
        ({"modus": "exact"}, "unknown option 'modus'; expected some of mode, draft,"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"batch_size": -3}, "batch_size is -3; expected"),
        ({"seed": -1}, "seed is -1; expected an integer from 0 to 2**64 - 1"),
        ({"seed": 2**64}, "expected an integer from 0 to 2**64 - 1"),
        ({"seed": 1.5}, "seed is 1.5; expected an integer"),
        ({"indices": [0, 1]}, "2 indices were given for 1 labels; expected one for each"),
        ({"indices": []}, "indices is empty; expected at least one"),
        ({"indices": [-1]}, "indices holds -1; expected 0 to"),
        ({"indices": [2**63]}, "expected 0 to"),
        ({"indices": [0.5]}, "indices is [0.5]; expected a list of whole numbers"),
        ({"options": specdec_rt.DecodeOptions(), "mode": "exact"}, "pass one or the other"),
    ],
)
def test_arguments_that_cannot_be_are_refused(idle, arguments, said):
    with pytest.raises(UsageError) as caught:
        idle.generate([1], **arguments)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("final_std", 0.0), ("t_max", 999)],
)
def test_exact_refuses_a_chain_on_which_it_cannot_work(tmp_path, field, value):
    folder = copy_bundle(tmp_path / "copy")
    edit_manifest(folder, "chain", field, value=value)
    pipeline = specdec_rt.load(folder)
    with pytest.raises(ChainError) as caught:
        pipeline.generate([1], mode="exact")
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert f"chain.{field}" in message
    assert str(value) in message
    assert "export with" in message
    assert len(pipeline.generate([1], mode="draft").images) == 1  # the other modes go on


def test_every_refusal_is_one_family():
    """One `except SpecDecError` is enough; a bad value is a ValueError too."""
    errors = [getattr(specdec_rt, name) for name in specdec_rt.__all__ if name.endswith("Error")]
    assert all(issubclass(error, SpecDecError) for error in errors)
    assert issubclass(UsageError, ValueError)
    exit_codes = {error.__name__: error.exit_code for error in errors}
    assert exit_codes == {
        "BackendError": 1,
        "BundleError": 2,
        "ChainError": 2,
        "OutputError": 2,
        "SpecDecError": 1,
        "UsageError": 2,
    }


def test_the_bundle_says_what_a_request_leaves_open(tmp_path):
    folder = copy_bundle(tmp_path / "copy")
    edit_manifest(folder, "defaults", "mode", value="draft")
    edit_manifest(folder, "defaults", "draft", value="small")
    stats = specdec_rt.load(folder).generate([1]).stats
    assert (stats.mode, stats.target_backbone_calls) == ("draft", 0)


def test_a_request_within_another_ones_progress_is_refused(pipeline):
    def again(done, total):  # noqa: ARG001  # a callback's
        pipeline.generate([1], mode="draft")

    with pytest.raises(UsageError, match="by the progress of another request on the same pipeline"):
        pipeline.generate([3], mode="draft", progress=again)
    assert pipeline.generate([3], mode="draft").images is not None  # the pipeline is free again
