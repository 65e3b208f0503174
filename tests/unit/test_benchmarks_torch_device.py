"""PyTorch as a backend: it does the runtime's work, in slots and padded rows as on a GPU."""

import numpy as np
import pytest
from torch_threads import one_torch_thread

from benchmarks.gpu.torch_device import TorchBackend, TorchDevice
from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.host import HostDevice
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.plan import Tuning


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with one_torch_thread():
        yield


def torch_device(*buckets):
    return TorchDevice("cpu", batch_buckets=buckets, graphs=True)


@pytest.mark.parametrize(
    ("name", "min_resume_steps", "options"),
    [
        ("digits", 3, {"prefill": 0.8}),
        ("digits", 24, {"prefill": 0.8}),
        ("digits-mar", 3, {"ar_steps": 4}),
    ],
)
def test_it_draws_the_runtimes_tokens(name, min_resume_steps, options):
    bundle, tuning = load_bundle(name), Tuning(min_resume_steps=min_resume_steps)
    torch_backend = TorchBackend.open(bundle, torch_device(1, 4), "fp32")

    found, expected = (
        Pipeline(bundle, backend, tuning=tuning)
        .generate([3, 1, 4], seed=7, mode="exact", draft_length=3, **options)
        .tokens
        for backend in (torch_backend, OnnxRuntimeBackend(threads=1))
    )

    assert np.abs(found - expected).max() <= 1e-3


def test_its_heads_in_half_precision_are_close_to_single_precision():
    bundle, rng, path = load_bundle("digits"), np.random.default_rng(0), {}
    for precision in ("fp32", "fp16"):
        pipeline = Pipeline(bundle, TorchBackend.open(bundle, torch_device(1), precision))
        head = pipeline.setup(DecodeOptions(mode="target")).target.head
        if not path:
            z = rng.standard_normal((2, 3, head.z_dim), np.float32)
            normals = rng.standard_normal((3, head.chain.length + 1, head.token_dim), np.float32)
        path[precision] = head.sample(z, np.full((2, 3), 0.5), normals).path

    difference = np.linalg.norm(path["fp16"] - path["fp32"]) / np.linalg.norm(path["fp32"])
    assert 1e-6 < difference <= 5e-3


ROWS, TRANSITIONS, DIM = 7, 9, 3
BEGIN = np.array([0, 0, 2, 4, 8, 3, 5])
END = np.array([9, 4, 3, 9, 9, 3, 2])
"""Windows of all kinds: a whole chain, parts of it, one transition, the last one, and two that are empty."""


def after_recurrence(device):
    """What `linear_recurrence` leaves on a device: path, mean and the state after, of the same random arrays."""
    rng = np.random.default_rng(0)

    def array(*shape, dtype=np.float32):
        made = device.zeros(shape, dtype)
        made[...] = rng.standard_normal(shape)
        return made

    path, normals = array(ROWS, TRANSITIONS + 1, DIM), array(ROWS, TRANSITIONS + 1, DIM)
    mean, coefficients = array(ROWS, TRANSITIONS, DIM), array(TRANSITIONS, 5, dtype=np.float64)
    evaluated = tuple(array(ROWS, DIM) for _ in range(3))
    window = tuple(device.zeros((ROWS,), np.int64) for _ in range(2))
    for made, values in zip(window, (BEGIN, END), strict=True):
        made[:] = values
    before = [each.copy() for each in (path, mean, evaluated[1])]

    call = device.linear_recurrence(path, mean, normals, evaluated, window, coefficients)
    for step in (device.upload(path, mean, normals, *evaluated, *window, coefficients), call):
        step()
    device.download(path, mean, evaluated[1])()
    return before, (path, mean, evaluated[1])


def test_its_recurrence_is_that_of_the_host():
    (before, found), (_, expected) = (after_recurrence(device) for device in (torch_device(1), HostDevice()))

    for made, wanted, untouched in zip(found, expected, before, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)
        assert np.abs(made - untouched).max() > 0.1


def test_its_recurrence_changes_nothing_outside_of_a_rows_window():
    (path, mean, _), (made_path, made_mean, _) = after_recurrence(torch_device(1))

    step = np.arange(TRANSITIONS)
    outside = (step < BEGIN[:, None]) | (step >= END[:, None])
    np.testing.assert_array_equal(made_mean[outside], mean[outside])
    np.testing.assert_array_equal(made_path[:, 1:][outside], path[:, 1:][outside])
    np.testing.assert_array_equal(made_path[:, 0], path[:, 0])
