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
        count_at = {"copy_view": 2, "gather_rows": 3, "scatter_rows": 3, "linear_recurrence": 9}[name]

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


def recurrence(path, mean, normals, evaluated, windows, coefficients):
    """What `Device.linear_recurrence` promises, row by row: path, mean and the states after."""
    path, mean, (before, after, evaluated_mean) = path.copy(), mean.copy(), (array.copy() for array in evaluated)
    for row, (begin, end) in enumerate(windows):
        if begin >= end:
            after[row] = before[row]
            continue
        x0_pred = coefficients[begin, 3] * before[row] + coefficients[begin, 4] * evaluated_mean[row]
        path[row, begin + 1], mean[row, begin] = after[row], evaluated_mean[row]
        for step in range(begin + 1, end):
            mean[row, step] = coefficients[step, 0] * path[row, step] + coefficients[step, 1] * x0_pred
            path[row, step + 1] = mean[row, step] + coefficients[step, 2] * normals[row, step + 1]
        after[row] = path[row, end]
    return path, mean, after


WINDOWS = {
    "all the same": [(1, 5)] * 4,
    "the whole chain": [(0, 6)] * 3,
    "one transition": [(2, 3)] * 3,
    "none": [(4, 4)] * 3,
    "each its own": [(0, 6), (1, 2), (3, 6), (6, 6), (1, 4), (5, 2), (1, 2), (3, 6)],
}


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())
def test_rows_go_on_with_their_prediction_through_windows_of_their_own(device, windows):
    rng = np.random.default_rng(0)
    rows, n, dim = len(windows), 6, 3
    shapes = {"path": (rows, n + 1, dim), "mean": (rows, n, dim), "normals": (rows, n + 1, dim)}
    shapes |= dict.fromkeys(("before", "after", "evaluated_mean"), (rows, dim))
    values = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    coefficients = rng.standard_normal((n, 5))
    path, mean, normals, *evaluated = values.values()
    expected = recurrence(path, mean, normals, evaluated, windows, coefficients)
    for where in (device, HostDevice()):
        arrays = {name: where.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, array in arrays.items():
            array[:] = values[name]
        window = where.zeros((rows,), np.int64), where.zeros((rows,), np.int64)
        table = where.zeros((n, 5), np.float64)
        (window[0][:], window[1][:]), table[:] = np.transpose(windows), coefficients
        where.upload(*arrays.values(), *window, table)()
        path, mean, normals, *evaluated = arrays.values()
        where.linear_recurrence(path, mean, normals, tuple(evaluated), window, table)()
        where.download(path, mean, arrays["after"])()
        where.wait()
        for found, wanted in zip((path, mean, arrays["after"]), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


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
