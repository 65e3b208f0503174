"""A diffusion head on its engines: one call for one transition of every row, or for all transitions of a path.

What stands here is eager and plain: `reference.py` is written on it. `chain_plan.py` records the same calls on static
buffers.
"""

from dataclasses import dataclass

import numpy as np

from specdec_rt.backends.base import BoundCall, Device, Engine, run_once
from specdec_rt.capacity import Capacity
from specdec_rt.chain import Chain
from specdec_rt.errors import BackendError
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["Head", "HeadEngines", "Trajectory", "require_finite"]


@dataclass(frozen=True)
class HeadEngines:
    """The graphs of a head, on one backend."""

    modulation: Engine
    denoise_step: Engine
    path_means: Engine


@dataclass(frozen=True)
class Trajectory:
    """Chains that were drawn, or judged."""

    path: FloatArray
    """`[R, n + 1, D]` visited states, noisiest first; the last one is the token"""
    mean: FloatArray
    """`[R, n, D]` the mean of every transition out of those states"""
    std: FloatArray | None = None
    """`[R, n, D]` standard deviations of those transitions, where the chain learns them"""

    @property
    def token(self) -> FloatArray:
        """`[R, D]`."""
        return self.path[:, -1]


@dataclass(eq=False)
class Head:
    """One model's head, and the chain it runs."""

    device: Device
    engines: HeadEngines
    time_table: FloatArray
    """`[n, W]` the time embedding of the chain's steps; on the device once the head is made, like `coefficients`"""
    chain: Chain
    token_dim: int
    """D"""
    z_dim: int
    """Z"""
    modulation_width: int
    """M"""
    capacity: Capacity = Capacity()

    def __post_init__(self) -> None:
        self.learned_std = self.chain.spec.variance == "learned"
        self.time_table = self.constant(self.time_table.astype(np.float32))
        self.coefficients = self.constant(self.chain.coefficients.astype(np.float32))
        self._modulation_buffer: Array = np.zeros(0, np.float32)

    # --- eager ------------------------------------------------------------------------------------------

    def sample(
        self,
        z: FloatArray,
        guidance: FloatArray,
        normals: FloatArray,
        *,
        begin: IntArray | None = None,
        step_mask: BoolArray | None = None,
    ) -> Trajectory:
        """Run the chains of R rows on conditions `z [G, R, Z]` with `guidance [G, R]`.

        `normals [R, n + 1, D]`: where each chain starts, then the noise of each transition. Row r runs from
        transition `begin[r]` on (default: from the first); up to there its path is its start, and its means are 0.
        Where `step_mask [n]` is False (default: nowhere) the head is not called: its last prediction x̂₀ is held; a
        row's first transition is always evaluated. Raises BackendError where an engine's output is not finite.
        """
        rows, n = len(normals), self.chain.length
        hold = self.chain.hold_coefficients  # columns p, q, std, u, v
        begin = np.zeros(rows, np.int64) if begin is None else begin
        step_mask = np.ones(n, np.bool_) if step_mask is None else step_mask
        path = np.repeat(normals[:, :1], n + 1, axis=1).astype(np.float32)
        mean = np.zeros((rows, n, self.token_dim), np.float32)
        std = np.zeros_like(mean) if self.learned_std else None
        x0_pred = np.zeros((rows, self.token_dim))
        for step in range(int(begin.min()), n):
            state, noise, active = path[:, step], normals[:, step + 1], (begin <= step)[:, None]
            evaluated = active & (step_mask[step] | (begin == step)[:, None])
            step_mean = hold[step, 0] * state + hold[step, 1] * x0_pred
            next_state = step_mean + hold[step, 2] * noise
            if evaluated.any():
                called_next, called_mean, called_std = self.transition(z, guidance, state, noise, step)
                x0_pred = np.where(evaluated, hold[step, 3] * state + hold[step, 4] * called_mean, x0_pred)
                step_mean = np.where(evaluated, called_mean, step_mean)
                next_state = np.where(evaluated, called_next, next_state)
                if std is not None:
                    std[:, step] = called_std
            mean[:, step] = np.where(active, step_mean, 0)
            path[:, step + 1] = np.where(active, next_state, state)
        require_finite(path[:, -1], "denoise_step")
        return Trajectory(path, mean, std)

    def transition(
        self, z: FloatArray, guidance: FloatArray, state: FloatArray, noise: FloatArray, step: int
    ) -> tuple[FloatArray, FloatArray, FloatArray | None]:
        """Next state, mean and (where it is learned) std `[R, D]` of one transition of R rows, all at one step.

        `z [G, R, Z]`, `guidance [G, R]`, `state [R, D]`, `noise [R, D]`.
        """
        modulation, steps = self._modulation(z, np.array([step]))[0], np.full(len(state), step)
        given = {"state": state, "modulation": modulation, "guidance": guidance, "step": steps, "noise": noise}
        made = self._run(self.engines.denoise_step, given, ["next_state", "mean"], state.shape)
        return made["next_state"], made["mean"], made.get("std")

    def means(self, path: FloatArray, z: FloatArray, guidance: FloatArray) -> FloatArray:
        """`[R, n, D]`: the mean of every transition out of the states of `path [R, n + 1, D]`, in batched calls.

        `z [G, R, Z]`, `guidance [G, R]`. Raises BackendError where a mean is not finite.
        """
        rows, n, dim = len(path), self.chain.length, self.token_dim
        size, found = self.paths_per_call(len(z)), []
        for part in (slice(first, first + size) for first in range(0, rows, size)):
            modulation = self._modulation(z[:, part], np.arange(n))
            given = {"path": path[part], "modulation": modulation, "guidance": guidance[:, part]}
            found.append(self._run(self.engines.path_means, given, ["mean"], (len(path[part]), n, dim))["mean"])
        require_finite(mean := np.concatenate(found), "path_means")
        return mean

    def _run(
        self, engine: Engine, given: dict[str, Array], names: list[str], shape: tuple[int, ...]
    ) -> dict[str, Array]:
        """Outputs, all of one shape. What is no index is cast to the float32 that graphs take."""
        cast = {
            name: value if value.dtype == np.int64 else np.asarray(value, np.float32) for name, value in given.items()
        }
        names = [*names, "std"] if self.learned_std else names
        return run_once(self.device, engine, cast | {"coefficients": self.coefficients}, dict.fromkeys(names, shape))

    def _modulation(self, z: FloatArray, steps: IntArray) -> FloatArray:
        """`[steps, R, G, M]` of conditions `z [G, R, Z]`."""
        (branches, rows, _), width = z.shape, self.modulation_width
        row, step = np.tile(np.arange(rows), len(steps)), np.repeat(steps, rows)
        inputs: dict[str, Array] = {
            "z": np.asarray(z, np.float32),
            "row": row,
            "time_table": self.time_table,
            "step": step,
        }
        made = run_once(self.device, self.engines.modulation, inputs, {"modulation": (len(row) * branches, width)})
        return made["modulation"].reshape(len(steps), rows, branches, width)

    # --- calls that others record -----------------------------------------------------------------------

    def modulate(self, z: Array, made: Array, steps: IntArray) -> tuple[Array, BoundCall]:
        """The call that makes `made [steps, R, G, M]` of `z [G, R, Z]`, for these `steps` of all rows.

        Its input `[steps * R]`, which step each row is at, comes first: the host may fill it anew.
        """
        count, rows, _, width = made.shape
        row, step = self.constant(np.tile(np.arange(rows), count)), self.constant(np.repeat(steps, rows))
        inputs = {"z": z, "row": row, "time_table": self.time_table, "step": step}
        return step, self.engines.modulation.bind(inputs, {"modulation": made.reshape(-1, width)})

    def modulation_buffer(self, branches: int, rows: int, steps: int) -> Array:
        """`[steps, R, G, M]` on the device. All chains of a head share this memory, one after the other."""
        values = steps * rows * branches * self.modulation_width
        if len(self._modulation_buffer) < values:
            self._modulation_buffer = self.device.zeros((values,), np.float32, staged=False)
        return self._modulation_buffer[:values].reshape(steps, rows, branches, self.modulation_width)

    def constant(self, values: Array) -> Array:
        """The values on the device; whoever changes them uploads them again."""
        array = self.device.stage(values)
        self.device.upload(array)()
        return array

    def bind_path_means(
        self, path: Array, modulation: Array, guidance: Array, coefficients: Array, mean: Array
    ) -> list[BoundCall]:
        """The calls that fill `mean`; arguments as the graph names them. `guidance [G, R]` may be a view."""
        own = self.device.zeros(guidance.shape, np.float32)
        inputs = {"path": path, "modulation": modulation, "guidance": own, "coefficients": coefficients}
        # Where std is learned the graph gives it as well; nobody reads it.
        std = {"std": self.device.zeros(mean.shape, np.float32, staged=False)} if self.learned_std else {}
        return [self.device.copy(own, guidance), self.engines.path_means.bind(inputs, {"mean": mean, **std})]

    def paths_per_call(self, branches: int) -> int:
        """How many paths are judged in one call."""
        return self.capacity.paths_per_call(branches, self.modulation_width, self.chain.length)


def require_finite(values: Array, graph: str) -> None:
    """Raise BackendError where an engine's output is not finite."""
    # A comparison with NaN is False: it would pass for a rejection, and then for a pixel.
    if not np.isfinite(values).all():
        raise BackendError(
            f"a {graph} engine returned values that are not finite; export the bundle again, "
            "in a wider precision if it was exported in a narrow one"
        )
