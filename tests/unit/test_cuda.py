"""A GPU's device: arrays and their device buffers, the kernels that copy between engines, captured steps."""

import ctypes
import gc
import shutil
import subprocess

import numpy as np
import pytest
from fake_cuda import PLAIN_KERNELS, FakeCuda

from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.backends.device_allocations import DeviceAllocations
from specdec_rt.backends.host import HostDevice
from specdec_rt.backends.kernels import KERNELS, SOURCE, compile_kernels
from specdec_rt.errors import BackendError

HOST = r"""
struct Axis { long long x; };
static Axis blockIdx, blockDim = {1}, threadIdx = {0};
#define __global__
"""
"""What makes the kernels' source C++ for the host: one block after the other, of one thread each."""


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory):
    """The shipped source, compiled for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text(
        HOST + SOURCE + 'extern "C" void set_block(long long block) { blockIdx.x = block; }'
    )
    library = folder / "kernels.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", folder / "kernels.cpp", "-o", library], check=True
    )
    loaded = ctypes.CDLL(str(library))

    def kernel(name):
        function = getattr(loaded, name)
        count_at = {"copy_view": 2, "gather_rows": 3, "scatter_rows": 3, "combine": 5, "recur_rows": 9}[name]

        def call(*arguments):
            typed = [ctypes.c_double(a) if isinstance(a, float) else ctypes.c_longlong(a) for a in arguments]
            for block in range(arguments[count_at] + 3):  # the last ones have no work
                loaded.set_block(ctypes.c_longlong(block))
                function(*typed)

        return call

    return {name: kernel(name) for name in KERNELS}


@pytest.fixture(params=["plain", "compiled"])
def device(request, monkeypatch):
    kernels = PLAIN_KERNELS if request.param == "plain" else request.getfixturevalue("compiled_kernels")
    cuda = FakeCuda(kernels)
    cuda.install(monkeypatch)
    return CudaDevice(batch_buckets=(1, 4), graphs=True)


def filled(device, *shape):
    array = device.zeros(shape, np.float32)
    array[...] = np.random.default_rng(sum(shape)).standard_normal(shape)
    device.upload(array)()
    return array


def fetched(device, array):
    device.download(array)()
    device.wait()
    return array


def test_zeros_are_zeros_on_both_sides(device):
    array = device.zeros((3, 2), np.int64)
    assert not array.any()
    array[:] = 5
    assert not fetched(device, array).any()


def test_entries_of_an_aligned_array_begin_aligned_and_move_with_their_gaps(device):
    array = device.aligned((3, 2, 5), np.float32)
    for row in array:
        assert row.flags.c_contiguous
        assert device.address(row) % 256 == 0
    values = np.random.default_rng(0).standard_normal(array.shape)
    array[...] = values
    device.upload(array)()
    device.wait()
    array[...] = 0
    np.testing.assert_array_equal(fetched(device, array), values.astype(np.float32))


def test_views_are_copied_with_their_strides(device):
    path, state = device.zeros((4, 6, 3), np.float32), filled(device, 6, 2, 3)
    expected = np.array(state[:, 1])
    device.copy(path[1], state[:, 1])()
    np.testing.assert_array_equal(fetched(device, path)[1], expected)
    assert not path[[0, 2, 3]].any()


def test_axes_are_swapped_and_broadcast(device):
    source, row = filled(device, 2, 5, 3), filled(device, 1, 3)
    swapped, rows = device.zeros((5, 2, 3), np.float32), device.zeros((4, 3), np.float32)
    device.copy(swapped, source.swapaxes(0, 1))()
    device.copy(rows, row)()
    np.testing.assert_array_equal(fetched(device, swapped), source.swapaxes(0, 1))
    np.testing.assert_array_equal(fetched(device, rows), np.tile(row, (4, 1)))


def test_rows_are_gathered_and_scattered(device):
    source, index = filled(device, 7, 3), device.zeros((4,), np.int64)
    index[:] = [6, 0, 0, 2]
    gathered, scattered = device.zeros((4, 3), np.float32), device.zeros((7, 3), np.float32)
    device.upload(index)()
    device.gather(gathered, source, index)()
    device.scatter(scattered, gathered, index)()
    expected = source[index].copy()
    np.testing.assert_array_equal(fetched(device, gathered), expected)
    np.testing.assert_array_equal(fetched(device, scattered)[[6, 0, 2]], source[[6, 0, 2]])
    assert not scattered[[1, 3, 4, 5]].any()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_recurrence_is_what_a_loop_makes(device, steps):
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(steps, 4))
    start, first, second = rng.normal(size=(3, 5, 3)).astype(np.float32)
    drawn = rng.normal(size=(steps, 5, 3)).astype(np.float32)
    means, states = [], [np.float64(start)]
    for each, (a, b, c, std) in enumerate(factors):
        means.append(a * states[-1] + b * first + c * second)
        states.append(means[-1] + std * drawn[each])
    for where in (device, HostDevice()):
        path, mean = where.aligned((steps + 1, 5, 3), np.float32), where.aligned((steps, 5, 3), np.float32)
        noise, held = where.aligned((steps, 5, 3), np.float32), [where.zeros((5, 3), np.float32) for _ in range(2)]
        path[0], noise[...], held[0][...], held[1][...] = start, drawn, first, second
        where.upload(path, noise, *held)()
        where.recur(path, mean, noise, (held[0], held[1]), factors)()
        where.download(path, mean)()
        where.wait()
        np.testing.assert_allclose(mean, means, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(path, states, rtol=1e-6, atol=1e-6)


def test_rows_recur_in_windows_of_their_own(device):
    rng = np.random.default_rng(0)
    length, windows = 5, [(0, 5), (1, 2), (3, 5), (5, 5), (1, 4), (1, 2)]  # whole, one step, an end, none, the midst
    rows, factors = len(windows), rng.normal(size=(length, 5))
    paths, drawn = rng.normal(size=(rows, length + 1, 3)), rng.normal(size=(rows, length, 3))
    nexts, firsts, lasts = rng.normal(size=(3, rows, 3)).astype(np.float32)
    paths, drawn = paths.astype(np.float32), drawn.astype(np.float32)
    expected, means, states = np.float64(paths), np.zeros((rows, length, 3)), np.float64(lasts)
    for row, (begin, end) in enumerate(windows):
        if begin == end:
            continue
        held = factors[begin, 3] * paths[row, begin] + factors[begin, 4] * np.float64(firsts[row])
        means[row, begin], expected[row, begin + 1] = firsts[row], nexts[row]
        for step in range(begin + 1, end):
            means[row, step] = factors[step, 0] * expected[row, step] + factors[step, 1] * held
            expected[row, step + 1] = means[row, step] + factors[step, 2] * drawn[row, step]
        states[row] = expected[row, end]
    for where in (device, HostDevice()):
        path, mean, noise = (where.zeros((rows, length + more, 3), np.float32) for more in (1, 0, 0))
        state, next_state, first_mean = (where.zeros((rows, 3), np.float32) for _ in range(3))
        begins, ends = (where.zeros((rows,), np.int64) for _ in range(2))
        table = where.zeros((length, 5), np.float64)
        path[:], noise[:], state[:], next_state[:], first_mean[:] = paths, drawn, lasts, nexts, firsts
        (begins[:], ends[:]), table[:] = np.transpose(windows), factors
        where.upload(path, noise, state, next_state, first_mean, begins, ends, table)()
        where.recur_rows(path, mean, noise, state, (next_state, first_mean), (begins, ends), table)()
        where.download(path, mean, state)()
        where.wait()
        np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(mean, means, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state, states, rtol=1e-5, atol=1e-5)


def test_a_step_is_captured_once_and_replayed(device):
    a, b = filled(device, 5), device.zeros((5,), np.float32)
    step = device.record([device.upload(a), device.copy(b, a), device.download(b)])
    for turn in range(3):
        a[:] = turn + 1
        step()
        device.wait()
        np.testing.assert_array_equal(b, np.full(5, turn + 1))
    assert device.stream.launches == 2


def test_a_step_that_cannot_be_captured_says_so_and_leaves_the_stream_free(device):
    def once():
        if device.stream.captured is not None:
            raise RuntimeError("not while capturing")

    step = device.record([once])
    with pytest.raises(BackendError, match=r"not while capturing; run without graphs \(--no-cuda-graph\)"):
        step()
    device.wait()


def test_what_is_not_the_devices_is_refused(device):
    with pytest.raises(BackendError, match="has no device memory"):
        device.upload(np.zeros(3, np.float32))
    with pytest.raises(BackendError, match="has gaps"):
        device.upload(device.zeros((4, 4), np.float32)[:, 1])


def test_memory_is_given_back_with_its_last_view(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    device = CudaDevice(batch_buckets=(1,), graphs=True)
    view = device.zeros((8, 4), np.float32)[2:, 1:].T
    gc.collect()
    assert cuda.allocated == 2  # the pinned array and its device buffer
    del view
    gc.collect()
    assert cuda.allocated == 2  # work on it may be queued, or just be captured
    device.wait()
    assert cuda.allocated == 0


@pytest.mark.parametrize(("images", "bucket"), [(1, 1), (2, 4), (4, 4), (9, 9)])
def test_a_batch_gets_the_smallest_bucket_that_fits(monkeypatch, images, bucket):
    FakeCuda().install(monkeypatch)
    assert CudaDevice(batch_buckets=(1, 4), graphs=True).batch_bucket(images) == bucket


@pytest.mark.parametrize(("count", "size"), [(1, 3), (3, 3), (4, 5), (5, 5), (6, 10), (10, 10)])
def test_other_sizes_are_a_quarter_half_or_all_of_their_limit(monkeypatch, count, size):
    FakeCuda().install(monkeypatch)
    assert CudaDevice(batch_buckets=(1,), graphs=True).bucketed(count, 10) == size


def test_a_view_lies_in_the_device_buffer_where_it_lies_in_its_array():
    allocations, first, second = DeviceAllocations(), np.zeros((4, 8), np.float32), np.zeros(3, np.int64)
    allocations.add(first, 1000, lambda: None)
    allocations.add(second, 5000, lambda: None)
    assert allocations.address(first) == 1000
    assert allocations.address(first[2:, 3:]) == 1000 + 2 * 32 + 3 * 4
    assert allocations.address(second[1:]) == 5008


@pytest.mark.parametrize("arch", ["75", "87", "90", "120"])
def test_nvrtc_compiles_the_kernels(arch):
    core = pytest.importorskip("cuda.core")
    pytest.importorskip("nvidia.cu13", reason="NVRTC is not installed")
    program = core.Program(SOURCE, code_type="c++", options=core.ProgramOptions(std="c++17", arch=f"sm_{arch}"))
    assert all(name.encode() in program.compile("cubin").code for name in KERNELS)


def test_without_nvrtc_the_error_says_what_to_install():
    class Missing:
        @staticmethod
        def ProgramOptions(**_):  # noqa: N802  # cuda.core's
            raise RuntimeError("libnvrtc.so is not there")

    with pytest.raises(BackendError, match=r"libnvrtc\.so is not there; install this package's 'cuda' extra"):
        compile_kernels(Missing, "90")
