"""A diffusion head on its engines: chains sampled step by step, or judged in one batched call."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.engine import BoundCall, Engine
from specdec_rt.errors import BackendError
from specdec_rt.schedule import Chain
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["Head", "Trajectory"]

KEPT_SHAPES = 32
"""Batch shapes whose buffers are kept for the next call."""
STATES_PER_CALL = 2**14
"""States (a path's, in every guidance branch) verified at a time: activations take some 70 bytes × width each."""


@dataclass(frozen=True)
class Trajectory:
    """Chains that were drawn."""

    path: FloatArray
    """`[R, n + 1, D]` visited states, noisiest first; the last is the token"""
    mean: FloatArray
    """`[R, n, D]` what each state after the first was drawn around"""
    std: FloatArray | None = None
    """`[R, n, D]` standard deviations of those draws, where the chain learns them"""


@dataclass(frozen=True)
class _StepBuffers:
    """Static buffers of one batch shape, and the calls bound to them, one per transition."""

    z: Array
    guidance: Array
    path: Array
    """`[n + 1, R, D]`"""
    noise: Array
    mean: Array
    std: Array | None
    calls: list[BoundCall]


@dataclass(frozen=True)
class _DensityBuffers:
    z: Array
    guidance: Array
    path: Array
    mean: Array
    call: BoundCall


class Head:
    """One model's head and the chain it runs. `time_table [n, W]` is `time_embedding` of the chain's steps."""

    def __init__(
        self,
        denoise_step: Engine,
        log_density: Engine,
        time_table: FloatArray,
        chain: Chain,
        token_dim: int,
        z_dim: int,
    ) -> None:
        self.chain = chain
        self.token_dim = token_dim
        self.z_dim = z_dim
        self._denoise_step = denoise_step
        self._log_density = log_density
        self._learned = chain.spec.variance == "learned"
        self._tables = {"time_table": time_table, "coefficients": chain.coefficients.astype(np.float32)}
        # A batch shrinks as its images finish: many shapes come by, the last used come again.
        self._steps = lru_cache(maxsize=KEPT_SHAPES)(self._bind_steps)
        self._density = lru_cache(maxsize=KEPT_SHAPES)(self._bind_density)

    def sample(
        self,
        z: FloatArray,
        guidance: FloatArray,
        start: FloatArray,
        noise: FloatArray,
        *,
        begin: IntArray | None = None,
        evaluate: BoolArray | None = None,
    ) -> Trajectory:
        """Run the chains of R rows to their ends.

        `z [G, R, Z]`, `guidance [G, R]`, `start [R, D]` the state before transition `begin [R]` (default 0),
        `noise [R, n, D]`. Where `evaluate [n]` is False the head is not called: its last prediction of
        the clean token is held. What lies before `begin` in the result means nothing.
        """
        n, rows = self.chain.length, len(start)
        begin = np.zeros(rows, np.int64) if begin is None else begin
        buffers = self._steps(z.shape[0], rows)
        buffers.z[:], buffers.guidance[:] = z, guidance
        buffers.noise[:] = noise.swapaxes(0, 1)
        first = int(begin.min())
        # Rows that start later run along from the first step on; each is set right at its own.
        buffers.path[first] = start
        held = np.zeros(0)
        for step in range(first, n):
            if step > first:
                late = begin == step
                if late.any():
                    buffers.path[step, late] = start[late]
            if evaluate is None or evaluate[step]:
                buffers.calls[step]()
                if evaluate is not None:
                    held = self._predict_clean(buffers, step)
            else:
                self._hold(buffers, step, held)
        ends = begin == n
        if ends.any():
            buffers.path[n, ends] = start[ends]
        _require_finite(buffers.path[n], "denoise_step")
        std = None if buffers.std is None else buffers.std.swapaxes(0, 1).copy()
        return Trajectory(buffers.path.swapaxes(0, 1).copy(), buffers.mean.swapaxes(0, 1).copy(), std)

    def means(self, path: FloatArray, z: FloatArray, guidance: FloatArray) -> FloatArray:
        """`[R, n, D]`: the mean of every transition out of the states of `path [R, n + 1, D]`.

        One batched call, or several where a batch is so large that its activations might not fit.
        """
        size = max(STATES_PER_CALL // (z.shape[0] * self.chain.length), 1)
        mean = np.empty((len(path), self.chain.length, self.token_dim), np.float32)
        for begin in range(0, len(path), size):
            rows = slice(begin, begin + size)
            buffers = self._density(z.shape[0], len(path[rows]))
            buffers.path[:], buffers.z[:], buffers.guidance[:] = path[rows], z[:, rows], guidance[:, rows]
            buffers.call()
            mean[rows] = buffers.mean
        _require_finite(mean, "log_density")
        return mean

    def _predict_clean(self, buffers: _StepBuffers, step: int) -> Array:
        chain = self.chain
        epsilon = (buffers.mean[step] - chain.state_coefficient[step] * buffers.path[step]) / chain.epsilon_coefficient[
            step
        ]
        return np.asarray(chain.prediction_state[step] * buffers.path[step] + chain.prediction_epsilon[step] * epsilon)

    def _hold(self, buffers: _StepBuffers, step: int, clean: Array) -> None:
        chain = self.chain
        of_clean = chain.epsilon_coefficient[step] / chain.prediction_epsilon[step]
        of_state = chain.state_coefficient[step] - of_clean * chain.prediction_state[step]
        buffers.mean[step] = of_state * buffers.path[step] + of_clean * clean
        buffers.path[step + 1] = buffers.mean[step] + chain.std[step] * buffers.noise[step]

    def _bind_steps(self, branches: int, rows: int) -> _StepBuffers:
        n, dim = self.chain.length, self.token_dim
        z, guidance = self._conditions(branches, rows)
        path = np.zeros((n + 1, rows, dim), np.float32)
        noise, mean = np.zeros((n, rows, dim), np.float32), np.zeros((n, rows, dim), np.float32)
        std = np.zeros((n, rows, dim), np.float32) if self._learned else None
        calls = [
            self._denoise_step.bind(
                {
                    "state": path[step],
                    "z": z,
                    "guidance": guidance,
                    **self._tables,
                    "step": np.full(rows, step, np.int64),
                    "noise": noise[step],
                },
                {"next_state": path[step + 1], "mean": mean[step], **({} if std is None else {"std": std[step]})},
            )
            for step in range(n)
        ]
        return _StepBuffers(z, guidance, path, noise, mean, std, calls)

    def _bind_density(self, branches: int, rows: int) -> _DensityBuffers:
        n, dim = self.chain.length, self.token_dim
        z, guidance = self._conditions(branches, rows)
        path, mean = np.zeros((rows, n + 1, dim), np.float32), np.zeros((rows, n, dim), np.float32)
        std = {"std": np.zeros_like(mean)} if self._learned else {}
        inputs = {"path": path, "z": z, "guidance": guidance, **self._tables}
        call = self._log_density.bind(inputs, {"mean": mean, **std})
        return _DensityBuffers(z, guidance, path, mean, call)

    def _conditions(self, branches: int, rows: int) -> tuple[Array, Array]:
        return np.zeros((branches, rows, self.z_dim), np.float32), np.zeros((branches, rows), np.float32)


def _require_finite(values: Array, graph: str) -> None:
    # A comparison with NaN is False: it would pass for a rejection, and then for a pixel.
    if not np.isfinite(values).all():
        raise BackendError(
            f"a {graph} engine returned values that are not finite; export the bundle again, "
            "in a wider precision if it was exported in a narrow one"
        )
