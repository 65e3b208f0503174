"""A diffusion head on its engines: chains sampled step by step, or judged in one batched call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np

from specdec_rt.backends.base import BoundCall, Device, Engine
from specdec_rt.chain import Chain
from specdec_rt.errors import BackendError
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = [
    "ChainBuffers",
    "ChainRun",
    "DensityPart",
    "Head",
    "Trajectory",
    "modulation_places",
    "paths_per_call",
    "require_finite",
]

STATES_PER_CALL = 2**14
"""States (a path's, in every guidance branch) verified at a time: activations take some 70 bytes × width each."""
MODULATION_VALUES = 2**26
"""Modulation made at a time (256 MiB): a chain's at once, or that of as many of its steps, or paths, as fit."""
BRANCHES = 2
"""G at most."""


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
    """Static buffers of R chains.

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
    modulation: Array
    """`[c, R, G, M]` for c steps at a time; all chains of a head share it, one after the other"""
    bound: dict[tuple[int, int], BoundCall] = field(default_factory=dict)
    """the call of each transition on each of those places"""

    @property
    def drawn(self) -> tuple[Array, ...]:
        """What a run of all calls leaves."""
        return (self.path, self.mean) if self.std is None else (self.path, self.mean, self.std)


@dataclass(frozen=True, eq=False)
class ChainRun:
    """One way through the transitions of some buffers."""

    buffers: ChainBuffers
    parts: list[tuple[IntArray, Array]]
    """transitions `[k]` whose modulation is made at once, and `[k R]` the step that each row is at in them"""
    calls: list[BoundCall]
    places: IntArray | None
    """`[n]` where each transition's modulation lies in the buffers when it is done; None: not all of it does"""

    @property
    def inputs(self) -> tuple[Array, ...]:
        """What `begin_at` stages."""
        return (self.buffers.step, *(steps for _, steps in self.parts))

    def begin_at(self, begin: IntArray | None) -> None:
        """Stage the transitions: all from the first one on, or row r from `begin[r]`."""
        staged = self.buffers.step
        n = len(staged)
        step = np.arange(n)[:, None]
        staged[:] = step if begin is None else np.minimum(begin + step, n - 1)
        for evaluated, steps in self.parts:
            steps.reshape(len(evaluated), -1)[:] = staged[evaluated]


@dataclass(frozen=True, eq=False)
class DensityPart:
    """Some rows of a batch whose means are evaluated at once."""

    rows: slice
    z: Array | None
    """`[G, r, Z]`; None where modulation is there already"""
    guidance: Array
    """`[G, r]`"""
    modulation: Array
    """`[n, r, G, M]`, there when it is done"""
    calls: list[BoundCall]


class Head:
    """One model's head and the chain it runs. `time_table [n, W]` is `time_embedding` of the chain's steps."""

    def __init__(
        self,
        device: Device,
        modulation: Engine,
        denoise_step: Engine,
        path_means: Engine,
        time_table: FloatArray,
        chain: Chain,
        token_dim: int,
        z_dim: int,
        modulation_width: int,
    ) -> None:
        self.device = device
        self.chain = chain
        self.token_dim = token_dim
        self.z_dim = z_dim
        self.learned = chain.spec.variance == "learned"
        self._modulation = modulation
        self._modulation_width = modulation_width
        self._denoise_step = denoise_step
        self._path_means = path_means
        self._tables = {"time_table": time_table, "coefficients": chain.coefficients}
        for name, table in self._tables.items():
            self._tables[name] = device.zeros(table.shape, np.float32)
            self._tables[name][:] = table
            device.upload(self._tables[name])()
        device.wait()
        self._arenas = [np.zeros(0, np.float32)] * 2
        """where modulation lies: of what is drawn or judged, and of what is taken from there"""
        # A batch shrinks as its images finish: many shapes come by, the last used come again.
        self.buffers = lru_cache(maxsize=device.kept_shapes)(self._make_buffers)
        """`(branches, rows)` → the buffers of so many chains"""
        self._means = lru_cache(maxsize=device.kept_shapes)(self._make_means)

    # --- parts of a step, recorded with others ------------------------------------------------------

    def run(
        self,
        buffers: ChainBuffers,
        evaluate: BoolArray | None = None,
        length: int | None = None,
        *,
        whole: bool = False,
    ) -> ChainRun:
        """A chain, or its first `length` transitions.

        Where `evaluate [n]` is False the head is not called: its last prediction of the clean token is held. With
        `whole`, modulation is made of these transitions as well where there is room, for who evaluates them later:
        it lies in one piece, after that of the others.
        """
        n = self.chain.length if length is None else length
        evaluated = np.arange(n) if evaluate is None else np.flatnonzero(evaluate[:n])
        room = len(buffers.modulation)
        whole = whole and n == self.chain.length <= room
        made = np.concatenate([evaluated, np.setdiff1d(np.arange(n), evaluated)]) if whole else evaluated
        parts, calls = [], []
        for first in range(0, len(made), room):
            part = made[first : first + room]
            steps, make = self.modulate(buffers.z, buffers.modulation[: len(part)])
            parts.append((part, steps))
            calls.append(make)
            called = evaluated[first : first + room].tolist()
            until = int(evaluated[first + room]) if first + room < len(evaluated) else n
            for place, (step, end) in enumerate(pairwise([*called, until])):
                calls.append(self._transition(buffers, step, place))
                if end > step + 1:
                    calls.append(self._hold(buffers, step, end))
        return ChainRun(buffers, parts, calls, np.argsort(made) if whole else None)

    def density(
        self,
        branches: int,
        path: Array,
        mean: Array,
        modulation: Array | None = None,
        transitions: IntArray | None = None,
    ) -> list[DensityPart]:
        """What evaluates the means `[R, L, D]` of L `transitions` out of the first L states of `path [R, L + 1, D]`.

        By default they are the chain's last. All rows at once, or several times some where a batch is so large that
        its activations might not fit. Where there is `modulation [L or more, R, G, M]` of these transitions already,
        it is used for all at once.
        """
        size, n = self.paths_per_call(branches), self.chain.length
        transitions = np.arange(n)[-mean.shape[1] :] if transitions is None else transitions
        coefficients = self._tables["coefficients"]
        if len(transitions) < n:
            coefficients = self.device.zeros((len(transitions), 4), np.float32)
            coefficients[:] = self.chain.coefficients[transitions]
            self.device.upload(coefficients)()
        if modulation is not None and len(path) <= size:
            return [self._part(branches, path, mean, coefficients, transitions, slice(0, len(path)), modulation)]
        # So many rows at a time that each part begins aligned, whatever a row's size, or else whatever is usual.
        size -= size % next(unit for unit in (64, 16, 4, 1) if unit <= size)
        parts = (slice(i, min(i + size, len(path))) for i in range(0, len(path), size))
        return [self._part(branches, path, mean, coefficients, transitions, part) for part in parts]

    def paths_per_call(self, branches: int) -> int:
        """How many paths are judged at once, and no more of their ends: engines are built for so many."""
        return paths_per_call(branches, self._modulation_width, self.chain.length)

    def places(self, rows: int, steps: int) -> int:
        """For how many of so many steps of R chains modulation is made at once."""
        return modulation_places(rows, self._modulation_width, steps)

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
        run = self.run(buffers, evaluate, n - int(first.min()))
        run.begin_at(first)
        buffers.noise[:] = noise[rows, buffers.step.T].swapaxes(0, 1)
        staged = (buffers.z, buffers.guidance, *run.inputs, buffers.path[0], buffers.noise)
        device.record([device.upload(*staged), *run.calls, device.download(*buffers.drawn)])()
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
            assert part.z is not None
            part.z[:], part.guidance[:] = z[:, part.rows], guidance[:, part.rows]
            calls += [device.upload(part.z, part.guidance), *part.calls]
        device.record([*calls, device.download(mean)])()
        device.wait()
        require_finite(mean, "path_means")
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

    def _hold(self, buffers: ChainBuffers, last: int, end: int) -> BoundCall:
        """Transitions `last + 1` to `end` (exclusive) on the clean token that step `last` predicted."""
        chain, held = self.chain, slice(last + 1, end)
        clean_of_epsilon = chain.prediction_epsilon[last] / chain.epsilon_coefficient[last]
        clean_of_state = chain.prediction_state[last] - clean_of_epsilon * chain.state_coefficient[last]
        of_clean = chain.epsilon_coefficient[held] / chain.prediction_epsilon[held]
        of_state = chain.state_coefficient[held] - of_clean * chain.prediction_state[held]
        factors = np.stack([of_state, of_clean * clean_of_state, of_clean * clean_of_epsilon, chain.std[held]], axis=1)
        return self.device.recur(
            buffers.path[last + 1 : end + 1],
            buffers.mean[held],
            buffers.noise[held],
            (buffers.path[last], buffers.mean[last]),
            factors,
        )

    def _make_buffers(self, branches: int, rows: int) -> ChainBuffers:
        device, n, dim = self.device, self.chain.length, self.token_dim
        z = device.zeros((branches, rows, self.z_dim), np.float32)
        guidance = device.zeros((branches, rows), np.float32)
        step = device.aligned((n, rows), np.int64)
        path = device.aligned((n + 1, rows, dim), np.float32)
        noise, mean = (device.aligned((n, rows, dim), np.float32) for _ in range(2))
        std = device.aligned((n, rows, dim), np.float32) if self.learned else None
        return ChainBuffers(z, guidance, step, path, noise, mean, std, self.room(branches, rows))

    def room(self, branches: int, rows: int, places: int | None = None, *, taken: bool = False) -> Array:
        """`[c, R, G, M]`: room for the modulation of some steps (`places`, or as many as fit) of R chains.

        All chains of a head share it, one after the other; what is `taken` from there has a room of its own.
        """
        width = self._modulation_width
        size = rows * branches * width
        if places is None:
            places = self.places(rows, self.chain.length)
        if len(self._arenas[taken]) < places * size:
            self._arenas[taken] = self.device.zeros((places * size,), np.float32, staged=False)
        return self._arenas[taken][: places * size].reshape(places, rows, branches, width)

    def modulate(self, z: Array, made: Array) -> tuple[Array, BoundCall]:
        """What makes `made [c, R, G, M]` of `z [G, R, Z]`, and its input `[c R]`: which steps they are."""
        device, (count, rows, _, width) = self.device, made.shape
        row, step = (device.zeros((count * rows,), np.int64) for _ in range(2))
        row[:] = np.tile(np.arange(rows), count)
        device.upload(row)()
        inputs = {"z": z, "row": row, "time_table": self._tables["time_table"], "step": step}
        return step, self._modulation.bind(inputs, {"modulation": made.reshape(-1, width)})

    def _transition(self, buffers: ChainBuffers, step: int, place: int) -> BoundCall:
        """The call of one transition, whose modulation lies at `place`."""
        if (step, place) not in buffers.bound:
            std = {} if buffers.std is None else {"std": buffers.std[step]}
            buffers.bound[step, place] = self.transition(
                {
                    "state": buffers.path[step],
                    "modulation": buffers.modulation[place],
                    "guidance": buffers.guidance,
                    "step": buffers.step[step],
                    "noise": buffers.noise[step],
                },
                {"next_state": buffers.path[step + 1], "mean": buffers.mean[step], **std},
            )
        return buffers.bound[step, place]

    def transition(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> BoundCall:
        """A call of `denoise_step`; `coefficients` are the chain's."""
        return self._denoise_step.bind({**inputs, "coefficients": self._tables["coefficients"]}, outputs)

    def _make_means(self, branches: int, rows: int) -> tuple[Array, Array, list[DensityPart]]:
        n, dim = self.chain.length, self.token_dim
        path = self.device.zeros((rows, n + 1, dim), np.float32)
        mean = self.device.zeros((rows, n, dim), np.float32)
        return path, mean, self.density(branches, path, mean)

    def _part(
        self,
        branches: int,
        path: Array,
        mean: Array,
        coefficients: Array,
        transitions: IntArray,
        rows: slice,
        modulation: Array | None = None,
    ) -> DensityPart:
        device, count = self.device, rows.stop - rows.start
        guidance = device.zeros((branches, count), np.float32)
        std = {"std": device.zeros(mean[rows].shape, np.float32, staged=False)} if self.learned else {}
        z, calls = None, []
        if modulation is None:
            z = device.zeros((branches, count, self.z_dim), np.float32)
            modulation = self.room(branches, count, len(transitions))
            step, make = self.modulate(z, modulation)
            step[:] = np.repeat(transitions, count)
            device.upload(step)()
            calls.append(make)
        inputs = {"path": path[rows], "modulation": modulation, "guidance": guidance, "coefficients": coefficients}
        calls.append(self._path_means.bind(inputs, {"mean": mean[rows], **std}))
        return DensityPart(rows, z, guidance, modulation, calls)


def modulation_places(rows: int, width: int, steps: int) -> int:
    """For how many of some steps of R chains modulation of `width` values is made at once."""
    if rows * width % 64:
        return 1  # places would begin between the bounds that engines want their buffers at
    return min(max(MODULATION_VALUES // (BRANCHES * rows * width), 1), steps)


def paths_per_call(branches: int, width: int, steps: int) -> int:
    """How many paths of so many steps are judged at once, in G branches, on modulation of `width` values."""
    return max(min(STATES_PER_CALL // (branches * steps), MODULATION_VALUES // (BRANCHES * steps * width)), 1)


def require_finite(values: Array, graph: str) -> None:
    """Raise BackendError where an engine's output is not finite."""
    # A comparison with NaN is False: it would pass for a rejection, and then for a pixel.
    if not np.isfinite(values).all():
        raise BackendError(
            f"a {graph} engine returned values that are not finite; export the bundle again, "
            "in a wider precision if it was exported in a narrow one"
        )
