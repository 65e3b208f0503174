"""A diffusion head on its engines: chains sampled step by step, or judged in one batched call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.engine import BoundCall, Device, Engine
from specdec_rt.errors import BackendError
from specdec_rt.schedule import Chain
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["ChainBuffers", "DensityPart", "Head", "Trajectory", "require_finite"]

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


@dataclass(frozen=True, eq=False)
class ChainBuffers:
    """Static buffers of R chains, and the calls bound to them.

    Call i takes row r through transition `step[i, r]`: rows that begin late in the chain start with the
    others and are done before them.
    """

    z: Array
    """`[G, R, Z]`"""
    guidance: Array
    """`[G, R]`"""
    step: Array
    """`[n, R]`"""
    path: Array
    """`[n + 1, R, D]`"""
    noise: Array
    """`[n, R, D]`"""
    mean: Array
    """`[n, R, D]`"""
    std: Array | None
    """`[n, R, D]`, where the chain learns it"""
    calls: list[BoundCall]
    """`[n]`"""

    @property
    def drawn(self) -> tuple[Array, ...]:
        """What a run of all calls leaves."""
        return (self.path, self.mean) if self.std is None else (self.path, self.mean, self.std)

    def begin_at(self, begin: IntArray | None) -> None:
        """Stage the transitions: all from the first one on, or row r from `begin[r]`."""
        n = len(self.step)
        step = np.arange(n)[:, None]
        self.step[:] = step if begin is None else np.minimum(begin + step, n - 1)


@dataclass(frozen=True, eq=False)
class DensityPart:
    """Some rows of a batch whose means are evaluated in one call."""

    rows: slice
    z: Array
    """`[G, r, Z]`"""
    guidance: Array
    """`[G, r]`"""
    call: BoundCall


class Head:
    """One model's head and the chain it runs. `time_table [n, W]` is `time_embedding` of the chain's steps."""

    def __init__(
        self,
        device: Device,
        denoise_step: Engine,
        log_density: Engine,
        time_table: FloatArray,
        chain: Chain,
        token_dim: int,
        z_dim: int,
    ) -> None:
        self.device = device
        self.chain = chain
        self.token_dim = token_dim
        self.z_dim = z_dim
        self.learned = chain.spec.variance == "learned"
        self._denoise_step = denoise_step
        self._log_density = log_density
        self._tables = {"time_table": time_table, "coefficients": chain.coefficients}
        for name, table in self._tables.items():
            self._tables[name] = device.zeros(table.shape, np.float32)
            self._tables[name][:] = table
            device.upload(self._tables[name])()
        device.wait()
        # A batch shrinks as its images finish: many shapes come by, the last used come again.
        self.buffers = lru_cache(maxsize=device.kept_shapes)(self._make_buffers)
        """`(branches, rows)` → the buffers of so many chains"""
        self._means = lru_cache(maxsize=device.kept_shapes)(self._make_means)

    # --- parts of a step, recorded with others ------------------------------------------------------

    def run(
        self, buffers: ChainBuffers, evaluate: BoolArray | None = None, length: int | None = None
    ) -> list[BoundCall]:
        """The calls of a chain, or of its first `length`.

        Where `evaluate [n]` is False the head is not called: its last prediction of the clean token is held.
        """
        if evaluate is None:
            return buffers.calls[:length]
        calls: list[BoundCall] = []
        last = 0
        for step, evaluated in enumerate(evaluate):
            if evaluated:
                calls.append(buffers.calls[step])
                last = step
            else:
                calls += self._hold(buffers, step, last)
        return calls

    def density(self, branches: int, path: Array, mean: Array) -> list[DensityPart]:
        """What evaluates the means `[R, n, D]` of the transitions out of the states of `path [R, n + 1, D]`.

        One call, or several where a batch is so large that its activations might not fit.
        """
        size = max(STATES_PER_CALL // (branches * self.chain.length), 1)
        # So many rows at a time that each part begins aligned, whatever a row's size, or else whatever is usual.
        size -= size % next(unit for unit in (64, 16, 4, 1) if unit <= size)
        return [self._part(branches, path, mean, slice(i, min(i + size, len(path)))) for i in range(0, len(path), size)]

    # --- whole steps --------------------------------------------------------------------------------

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
        `noise [R, n, D]`, `evaluate` as in `run`. What lies before `begin` in the result means nothing.
        """
        device, n, rows = self.device, self.chain.length, np.arange(len(start))[:, None]
        first = np.zeros(len(start), np.int64) if begin is None else begin
        buffers = self.buffers(len(z), len(start))
        buffers.z[:], buffers.guidance[:], buffers.path[0] = z, guidance, start
        buffers.begin_at(first)
        buffers.noise[:] = noise[rows, buffers.step.T].swapaxes(0, 1)
        staged = (buffers.z, buffers.guidance, buffers.step, buffers.path[0], buffers.noise)
        calls = self.run(buffers, evaluate, n - int(first.min()))
        device.record([device.upload(*staged), *calls, device.download(*buffers.drawn)])()
        device.wait()
        at = np.maximum(np.arange(n + 1) - first[:, None], 0)
        path, mean = buffers.path[at, rows], buffers.mean[at[:, :n], rows]
        require_finite(path[:, n], "denoise_step")
        return Trajectory(path, mean, None if buffers.std is None else buffers.std[at[:, :n], rows])

    def means(self, path: FloatArray, z: FloatArray, guidance: FloatArray) -> FloatArray:
        """`[R, n, D]`: the mean of every transition out of the states of `path [R, n + 1, D]`."""
        device = self.device
        states, mean, parts = self._means(len(z), len(path))
        states[:] = path
        calls = [device.upload(states)]
        for part in parts:
            part.z[:], part.guidance[:] = z[:, part.rows], guidance[:, part.rows]
            calls += [device.upload(part.z, part.guidance), part.call]
        device.record([*calls, device.download(mean)])()
        device.wait()
        require_finite(mean, "log_density")
        return mean.copy()

    def finish(
        self, z: FloatArray, guidance: FloatArray
    ) -> Callable[[IntArray, FloatArray, FloatArray, IntArray], tuple[FloatArray, FloatArray]]:
        """A `verify.Finish` for chains whose R rows have `z [G, R, Z]` and `guidance [G, R]`."""

        def finish(
            rows: IntArray, start: FloatArray, noise: FloatArray, begin: IntArray
        ) -> tuple[FloatArray, FloatArray]:
            drawn = self.sample(z[:, rows], guidance[:, rows], start, noise, begin=begin)
            return drawn.path[:, -1], drawn.mean[:, -1]

        return finish

    # --- buffers ------------------------------------------------------------------------------------

    def _hold(self, buffers: ChainBuffers, step: int, last: int) -> list[BoundCall]:
        """A transition on the clean token that step `last` predicted."""
        device, chain = self.device, self.chain
        clean_of_epsilon = chain.prediction_epsilon[last] / chain.epsilon_coefficient[last]
        clean_of_state = chain.prediction_state[last] - clean_of_epsilon * chain.state_coefficient[last]
        of_clean = chain.epsilon_coefficient[step] / chain.prediction_epsilon[step]
        of_state = chain.state_coefficient[step] - of_clean * chain.prediction_state[step]
        terms = [
            (float(of_state), buffers.path[step]),
            (float(of_clean * clean_of_state), buffers.path[last]),
            (float(of_clean * clean_of_epsilon), buffers.mean[last]),
        ]
        drawn = [(1.0, buffers.mean[step]), (float(chain.std[step]), buffers.noise[step])]
        return [device.combine(buffers.mean[step], terms), device.combine(buffers.path[step + 1], drawn)]

    def _make_buffers(self, branches: int, rows: int) -> ChainBuffers:
        device, n, dim = self.device, self.chain.length, self.token_dim
        z = device.zeros((branches, rows, self.z_dim), np.float32)
        guidance = device.zeros((branches, rows), np.float32)
        step = device.pitched((n, rows), np.int64)
        path = device.pitched((n + 1, rows, dim), np.float32)
        noise, mean = (device.pitched((n, rows, dim), np.float32) for _ in range(2))
        std = device.pitched((n, rows, dim), np.float32) if self.learned else None
        calls = [
            self._denoise_step.bind(
                {
                    "state": path[i],
                    "z": z,
                    "guidance": guidance,
                    **self._tables,
                    "step": step[i],
                    "noise": noise[i],
                },
                {"next_state": path[i + 1], "mean": mean[i], **({} if std is None else {"std": std[i]})},
            )
            for i in range(n)
        ]
        return ChainBuffers(z, guidance, step, path, noise, mean, std, calls)

    def _make_means(self, branches: int, rows: int) -> tuple[Array, Array, list[DensityPart]]:
        n, dim = self.chain.length, self.token_dim
        path = self.device.zeros((rows, n + 1, dim), np.float32)
        mean = self.device.zeros((rows, n, dim), np.float32)
        return path, mean, self.density(branches, path, mean)

    def _part(self, branches: int, path: Array, mean: Array, rows: slice) -> DensityPart:
        device, count = self.device, rows.stop - rows.start
        z = device.zeros((branches, count, self.z_dim), np.float32)
        guidance = device.zeros((branches, count), np.float32)
        inputs = {"path": path[rows], "z": z, "guidance": guidance, **self._tables}
        std = {"std": device.zeros(mean[rows].shape, np.float32, staged=False)} if self.learned else {}
        return DensityPart(rows, z, guidance, self._log_density.bind(inputs, {"mean": mean[rows], **std}))


def require_finite(values: Array, graph: str) -> None:
    """Raise BackendError where an engine's output is not finite."""
    # A comparison with NaN is False: it would pass for a rejection, and then for a pixel.
    if not np.isfinite(values).all():
        raise BackendError(
            f"a {graph} engine returned values that are not finite; export the bundle again, "
            "in a wider precision if it was exported in a narrow one"
        )
