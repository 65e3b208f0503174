"""Chains on static buffers are the chains that the head samples eagerly, wherever rows begin and whatever is left out.

And what a head evaluates of a path that it drafted is what it evaluates of any path.
"""

from functools import cache

import numpy as np
import pytest
from fake_cuda import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.capacity import Capacity
from specdec_rt.decode.chain_plan import CallBuffers, ChainArrays, FullChains, StridedChains
from specdec_rt.decode.path_means import evaluate_left_out, evaluate_paths
from specdec_rt.plan import Tuning

BRANCHES, ROWS, N = 2, 9, 23
WIDE, NARROW = Capacity(), Capacity(modulation_values=2 * ROWS * 2816 * 5)
"""Room for modulation of all steps of the chains at a time, or of five."""
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""One chain: rounding has no image to grow along."""
FEW = settings(max_examples=15, deadline=None, derandomize=True)
begins = st.lists(st.integers(0, N - 1), min_size=ROWS, max_size=ROWS).map(np.array)
masks = st.lists(st.booleans(), min_size=N, max_size=N).map(np.array)


@pytest.fixture(scope="module", params=["host", "gpu"])
def make_head(request, make_gpu):
    """Gives the head of the digits target with some capacity, always the same one."""
    on_host = request.param == "host"
    backend = OnnxRuntimeBackend(threads=1) if on_host else FakeBackend(make_gpu(batch_buckets=(1,))[1])

    @cache
    def head(capacity=WIDE):
        pipeline = Pipeline(load_bundle("digits"), backend, tuning=Tuning(capacity=capacity))
        return pipeline.setup(DecodeOptions(guidance=2.0)).target.head

    return head


class Chains:
    """What some chains are made of: conditions among others, guidance, and noise."""

    def __init__(self, head, seed=0):
        rng = np.random.default_rng(seed)
        self.head, self.device = head, head.device
        self.z = self.device.zeros((BRANCHES * ROWS + 3, head.z_dim), np.float32)
        self.z[:] = rng.standard_normal(self.z.shape)
        self.z_row = rng.permutation(len(self.z))[: BRANCHES * ROWS]
        self.conditions = self.z[self.z_row].reshape(BRANCHES, ROWS, -1).copy()
        self.guidance = np.array([[1.5], [-0.5]]) + 0.1 * rng.standard_normal((BRANCHES, ROWS))
        self.normals = rng.standard_normal((ROWS, N + 1, head.token_dim)).astype(np.float32)
        self.buffers = CallBuffers(head, BRANCHES, ROWS)

    def sampled(self, **given):
        """The chains as the head samples them."""
        return self.head.sample(self.conditions, self.guidance, self.normals, **given)

    def evaluated(self, path):
        """`[R, n, D]` the head's means along paths."""
        return self.head.means(path, self.conditions, self.guidance)

    def arrays(self, transition):
        """Arrays filled for chains whose h-th noise is that of `transition[r, h]`."""
        arrays = ChainArrays.make(self.head, BRANCHES, ROWS, transition.shape[1])
        arrays.guidance[:], arrays.normals[:, 0] = self.guidance, self.normals[:, 0]
        arrays.normals[:, 1:] = np.take_along_axis(self.normals, 1 + transition[..., None], axis=1)
        return arrays

    def launch(self, chains, arrays, calls=(), begin=None, mean=None):
        """Run chains, and what comes after them, as one launch."""
        chains.z_row[:] = self.z_row
        if begin is not None:
            chains.begin_at(begin)
        upload = self.device.upload(self.z, arrays.guidance, arrays.normals, chains.z_row, *chains.inputs)
        download = self.device.download(*arrays.drawn, *([] if mean is None else [mean]))
        self.device.record([upload, *chains.calls, *calls, download])()
        self.device.wait()


@FEW
@given(begin=begins)
def test_full_chains_begin_where_they_are_told(make_head, begin):
    chains, length = Chains(make_head()), N - begin.min()
    arrays = chains.arrays(np.minimum(begin[:, None] + np.arange(length), N - 1))
    full = FullChains(chains.head, chains.buffers, chains.z, arrays, own_begin=True)
    chains.launch(full, arrays, begin=begin)
    expected = chains.sampled(begin=begin)
    for row, first in enumerate(begin):
        np.testing.assert_allclose(arrays.path[row, : N - first + 1], expected.path[row, first:], **CLOSE)
        np.testing.assert_allclose(arrays.mean[row, : N - first], expected.mean[row, first:], **CLOSE)


@FEW
@given(begin=begins, mask=masks, data=st.data())
def test_suffixes_on_few_steps_begin_where_they_are_told(make_head, begin, mask, data):
    length = data.draw(st.integers(N - begin.min(), N))
    chains, first = Chains(make_head()), N - length
    arrays = chains.arrays(np.tile(np.arange(first, N), (ROWS, 1)))
    mean = chains.device.zeros(arrays.mean.shape, np.float32)
    strided = StridedChains(chains.head, chains.buffers, chains.z, arrays, mask[first:], own_begin=True)
    chains.launch(strided, arrays, evaluate_left_out(chains.head, strided, arrays, mean), begin, mean)

    expected = chains.sampled(begin=begin, step_mask=mask)
    evaluated = chains.evaluated(expected.path)
    np.testing.assert_allclose(arrays.path, expected.path[:, first:], **CLOSE)
    for row, own in enumerate(begin - first):
        np.testing.assert_allclose(arrays.mean[row, own:], expected.mean[row, begin[row] :], **CLOSE)
        np.testing.assert_allclose(mean[row, own:], evaluated[row, begin[row] :], **CLOSE)


@pytest.mark.parametrize("capacity", [WIDE, NARROW], ids=["wide", "narrow"])
@FEW
@given(mask=masks)
def test_whole_chains_on_few_steps(make_head, capacity, mask):
    mask[0] = True  # the head has to be called at the first step
    chains = Chains(make_head(capacity))
    arrays = chains.arrays(np.tile(np.arange(N), (ROWS, 1)))
    strided = StridedChains(chains.head, chains.buffers, chains.z, arrays, mask, keep_left_out=True)
    fits = capacity is WIDE
    assert (strided.left_out_modulation is not None) == fits
    mean = chains.device.zeros(arrays.mean.shape, np.float32)
    judged = evaluate_left_out(chains.head, strided, arrays, mean) if fits else []
    chains.launch(strided, arrays, judged, mean=mean)

    expected = chains.sampled(step_mask=mask)
    np.testing.assert_allclose(arrays.path, expected.path, **CLOSE)
    np.testing.assert_allclose(arrays.mean, expected.mean, **CLOSE)
    if fits:
        np.testing.assert_allclose(mean, chains.evaluated(expected.path), **CLOSE)
        np.testing.assert_array_equal(mean[:, mask], arrays.mean[:, mask])


@pytest.mark.parametrize("capacity", [WIDE, NARROW], ids=["wide", "narrow"])
def test_whole_chains_at_every_step(make_head, capacity):
    chains = Chains(make_head(capacity))
    arrays = chains.arrays(np.tile(np.arange(N), (ROWS, 1)))
    chains.launch(FullChains(chains.head, chains.buffers, chains.z, arrays), arrays)
    expected = chains.sampled()
    np.testing.assert_allclose(arrays.path, expected.path, **CLOSE)
    np.testing.assert_allclose(arrays.mean, expected.mean, **CLOSE)


@pytest.mark.parametrize(("paths_per_call", "sizes"), [(4, [4, 4, 1]), (7, [4, 4, 1]), (100, [9])])
def test_paths_are_evaluated_so_many_at_a_time(make_head, paths_per_call, sizes):
    """All parts but the last have a size that lets the next one begin aligned."""
    chains = Chains(make_head(Capacity(states_per_call=BRANCHES * N * paths_per_call)))
    arrays = chains.arrays(np.tile(np.arange(N), (ROWS, 1)))
    arrays.path[:] = np.random.default_rng(1).standard_normal(arrays.path.shape)
    path = arrays.path.copy()
    parts, calls = evaluate_paths(chains.head, chains.z, arrays)
    assert [part.stop - part.start for part, _ in parts] == sizes
    for part, z_row in parts:
        z_row[:] = chains.z_row.reshape(BRANCHES, ROWS)[:, part].ravel()
    device, z_rows = chains.device, [z_row for _, z_row in parts]
    upload, download = device.upload(chains.z, arrays.guidance, arrays.path, *z_rows), device.download(arrays.mean)
    device.record([upload, *calls, download])()
    device.wait()
    np.testing.assert_allclose(arrays.mean, chains.evaluated(path), **CLOSE)


def test_noise_of_another_transition_is_seen(make_head):
    """The comparisons above can fail."""
    begin, mask = np.arange(3, 3 + ROWS), np.arange(N) % 4 == 0
    chains = Chains(make_head())
    arrays = chains.arrays(np.tile(np.arange(N), (ROWS, 1)))
    arrays.normals[1, 10] = arrays.normals[1, 11]
    strided = StridedChains(chains.head, chains.buffers, chains.z, arrays, mask, own_begin=True)
    chains.launch(strided, arrays, begin=begin)
    expected = chains.sampled(begin=begin, step_mask=mask)
    differences = np.abs(arrays.path - expected.path).max(axis=(1, 2))
    assert differences[1] > 0.01
    assert np.delete(differences, 1).max() < 1e-4
