"""The CUDA kernels that move data between engines; NVRTC compiles them on the machine where they run."""

from collections.abc import Mapping
from typing import Any

from specdec_rt.errors import BackendError

__all__ = ["KERNELS", "SOURCE", "compile_kernels"]

KERNELS = ("copy_view", "gather_rows", "scatter_rows", "linear_recurrence")

SOURCE = r"""
// Every kernel has one thread per value; `count` of them have work.
typedef long long index_t;

#define VALUE(i, count) \
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= count) return

// Four axes of sizes (any, n1, n2, n3), strides in values.
extern "C" __global__ void copy_view(float* to, const float* from, index_t count, index_t n1, index_t n2, index_t n3,
                                     index_t t0, index_t t1, index_t t2, index_t t3,
                                     index_t f0, index_t f1, index_t f2, index_t f3) {
    VALUE(i, count);
    const index_t d = i % n3, c = i / n3 % n2, b = i / (n3 * n2) % n1, a = i / (n3 * n2 * n1);
    to[a * t0 + b * t1 + c * t2 + d * t3] = from[a * f0 + b * f1 + c * f2 + d * f3];
}

extern "C" __global__ void gather_rows(float* to, const float* from, const index_t* index, index_t count,
                                       index_t width) {
    VALUE(i, count);
    to[i] = from[index[i / width] * width + i % width];
}

extern "C" __global__ void scatter_rows(float* to, const float* from, const index_t* index, index_t count,
                                        index_t width) {
    VALUE(i, count);
    to[index[i / width] * width + i % width] = from[i];
}

// One value of a row through its window (begins[row], ends[row]) of transitions; five coefficients each.
extern "C" __global__ void linear_recurrence(float* path, float* mean, const float* normals, const float* before,
                                             float* after, const float* evaluated_mean, const index_t* begins,
                                             const index_t* ends, const double* coefficients, index_t count,
                                             index_t transitions, index_t dim) {
    VALUE(i, count);
    const index_t row = i / dim, d = i % dim, begin = begins[row], end = ends[row];
    if (begin >= end) {
        after[i] = before[i];
        return;
    }
    float* x = path + row * (transitions + 1) * dim + d;
    float* m = mean + row * transitions * dim + d;
    const float* z = normals + row * (transitions + 1) * dim + d;
    const double* c = coefficients + 5 * begin;
    const double x0_pred = c[3] * before[i] + c[4] * evaluated_mean[i];
    float state = after[i];
    m[begin * dim] = evaluated_mean[i];
    x[(begin + 1) * dim] = state;
    for (index_t h = begin + 1; h < end; ++h) {
        c = coefficients + 5 * h;
        const double around = c[0] * state + c[1] * x0_pred;
        state = (float)(around + c[2] * z[(h + 1) * dim]);
        m[h * dim] = (float)around;
        x[(h + 1) * dim] = state;
    }
    after[i] = state;
}
"""


def compile_kernels(core: Any, arch: str) -> Mapping[str, Any]:  # noqa: ANN401  # cuda.core, imported by the caller
    """The kernels for GPUs of `arch` ("90"). Raises BackendError where NVRTC is missing or refuses."""
    try:
        options = core.ProgramOptions(std="c++17", arch=f"sm_{arch}")
        code = core.Program(SOURCE, code_type="c++", options=options).compile("cubin")
        return {name: code.get_kernel(name) for name in KERNELS}
    except Exception as error:  # missing libraries, driver and compiler each have errors of their own
        raise BackendError(
            f"the kernels for sm_{arch} cannot be compiled: {error}; install this package's 'cuda' extra"
        ) from error
