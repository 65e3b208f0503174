"""Speculation on what is left of a chain: the target's head drafts the rest on a few steps, and judges all of it.

Where a token was rejected its chain has to go on from the state that was drawn instead. Step by step that is half a
chain's sequential calls for one rejected token, and nearly a whole chain's for the unluckiest of many. The rest of a
chain is a chain: it is drafted and verified like the whole (De Bortoli et al., arXiv 2501.05370, repeat it so), until
it is accepted, or short.

Rows go on from different steps. They run side by side, each with evaluations at steps of its own: the first where it
begins, the others where a whole chain's draft has them.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from specdec_rt.decode.chain import Head, Trajectory, require_finite
from specdec_rt.decode.draft import ChainNoise, Proposal
from specdec_rt.engine import BoundCall, Device
from specdec_rt.families.backbone import Ask
from specdec_rt.schedule import Chain
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["LEAST", "Redraft", "Redrafts", "Round", "evaluations", "held_factors", "make_redraft"]

LEAST = 24
"""Transitions left for which it pays: a draft, its verification and a verdict have to be less than so many calls."""


@dataclass(frozen=True, eq=False)
class Redraft:
    """Buffers of R rows for the last L transitions of a chain; what is drafted and judged lies in them after a launch.

    Steps are numbered from the first of the L.
    """

    z_row: Array
    """`[G R]` rows of the backbone's z; of no use where modulation is taken from the round"""
    taken: Array | None
    """`[L R]` where the round has the modulation of each step and row; None: it is made anew"""
    guidance: Array
    """`[G, R]`"""
    state: Array
    """`[R, D]` where each row goes on from"""
    noise: Array
    """`[R, L, D]`"""
    windows: Array
    """`[k + 1, R]` the steps that are evaluated; L: none any more"""
    step: Array
    """`[k, R]` the same steps, as the whole chain numbers them"""
    modulation_row: Array
    """`[k, R]` where their modulation lies"""
    noise_row: Array
    """`[k, R]` where their noise lies"""
    path: Array
    """`[R, L + 1, D]`; up to where a row begins it means nothing"""
    mean: Array
    """`[R, L, D]` of the draft"""
    target_mean: Array
    """`[R, L, D]`"""
    launch: BoundCall

    def fill(self, start: FloatArray, noise: FloatArray, begin: IntArray, grid: BoolArray) -> None:
        """Stage all but conditions: rows go on from `start [R, D]`, before transition `begin [R]` of the whole chain.

        `noise [R, n, D]` is numbered like that, too; `grid [n]` as in `evaluations`.
        """
        rows, length = self.noise.shape[:2]
        n = noise.shape[1]
        first = n - length
        self.state[:], self.path[:], self.noise[:] = start, start[:, None], noise[:, first:]
        self.windows[:] = evaluations(begin - first, grid[first:])
        at = np.minimum(self.windows[:-1], length - 1)  # rows that are done compute what nobody reads
        self.step[:] = first + at
        self.modulation_row[:] = at * rows + np.arange(rows)
        self.noise_row[:] = np.arange(rows) * length + at


def evaluations(begin: IntArray, grid: BoolArray) -> IntArray:
    """`[k + 1, R]`: where rows evaluate the head that have `begin [R]` ≤ L - 1 of L steps before them.

    First there, then at each step of `grid [L]` after it, ascending, then L.
    """
    steps = np.flatnonzero(grid)[:, None]
    after = np.sort(np.where(steps > begin, steps, len(grid)), axis=0)
    return np.concatenate([begin[None], after, np.full((1, len(begin)), len(grid))])


def make_redraft(
    device: Device,
    head: Head,
    z: Array,
    source: Array | None,
    branches: int,
    rows: int,
    length: int,
    grid: BoolArray,
) -> Redraft:
    """Buffers for R rows and the last L transitions; `grid [n]` is the draft's.

    Modulation is taken from `source [n, R', G, M]`, that of a round, or made of conditions out of `z [M, Z]`.
    """
    dim, chain = head.token_dim, head.chain
    first = chain.length - length
    calls = 1 + int(grid[first:].sum())

    def zeros(*shape: int) -> Array:
        return device.zeros(shape, np.float32)

    guidance, state = zeros(branches, rows), zeros(rows, dim)
    noise, mean, target_mean = (zeros(rows, length, dim) for _ in range(3))
    path = zeros(rows, length + 1, dim)
    next_state, first_mean, step_noise = (zeros(rows, dim) for _ in range(3))
    windows, *indices = (device.pitched((size, rows), np.int64) for size in (calls + 1, calls, calls, calls))
    step, modulation_row, noise_row = indices
    z_row = device.zeros((branches * rows,), np.int64)
    coefficients = zeros(length, 4)
    coefficients[:] = chain.coefficients[first:]
    factors = device.zeros((length, 5), np.float64)
    factors[:] = held_factors(chain)[first:]
    device.upload(coefficients, factors)()

    modulation = head.room(branches, rows, length, taken=source is not None)
    staged, taken, conditioned = [guidance, state, path, noise, windows, *indices], None, []
    if source is None:
        conditions = zeros(branches, rows, head.z_dim)
        modulated, make = head.modulate(conditions, modulation)
        modulated[:] = np.repeat(np.arange(first, chain.length), rows)
        device.upload(modulated)()
        staged.append(z_row)
        conditioned = [device.gather(conditions.reshape(len(z_row), -1), z, z_row), make]
    else:
        taken = device.zeros((length * rows,), np.int64)
        staged.append(taken)
        of_round = source.reshape(source.shape[0] * source.shape[1], -1)
        conditioned = [device.gather(modulation.reshape(len(taken), -1), of_round, taken)]
    of_step = zeros(rows, branches, modulation.shape[-1])
    recorded = [device.upload(*staged), *conditioned]
    for each in range(calls):
        inputs = {
            "state": state,
            "modulation": of_step,
            "guidance": guidance,
            "step": step[each],
            "noise": step_noise,
        }
        recorded += [
            device.gather(of_step.reshape(rows, -1), modulation.reshape(length * rows, -1), modulation_row[each]),
            device.gather(step_noise, noise.reshape(-1, dim), noise_row[each]),
            head.transition(inputs, {"next_state": next_state, "mean": first_mean}),
            device.recur_rows(
                path, mean, noise, state, (next_state, first_mean), (windows[each], windows[each + 1]), factors
            ),
        ]
    judged = {"path": path, "modulation": modulation, "guidance": guidance, "coefficients": coefficients}
    recorded += [head.judging(judged, {"mean": target_mean}), device.download(path, mean, target_mean)]
    return Redraft(
        z_row=z_row,
        taken=taken,
        guidance=guidance,
        state=state,
        noise=noise,
        windows=windows,
        step=step,
        modulation_row=modulation_row,
        noise_row=noise_row,
        path=path,
        mean=mean,
        target_mean=target_mean,
        launch=device.record(recorded),
    )


def held_factors(chain: Chain) -> FloatArray:
    """`[n, 5]` factors of `Device.recur_rows`: what is held is the clean token that a step predicts."""
    of_clean = chain.epsilon_coefficient / chain.prediction_epsilon
    of_state = chain.state_coefficient - of_clean * chain.prediction_state
    clean_of_mean = chain.prediction_epsilon / chain.epsilon_coefficient
    clean_of_state = chain.prediction_state - clean_of_mean * chain.state_coefficient
    return np.stack([of_state, of_clean, chain.std, clean_of_state, clean_of_mean], axis=1)


@dataclass(frozen=True, eq=False)
class Round:
    """What is left of a round for its rejected rows to go on from: R of them among R' padded ones."""

    ask: Ask
    """the target's backbone call"""
    z_rows: IntArray
    """`[G, R]` rows of its z"""
    padded: int
    """R'"""
    where: IntArray
    """`[R]`"""
    modulation: Array | None
    """`[n, R', G, M]` of all rows; None where they were judged part by part"""


class Redrafts:
    """Rests of chains of the rows of a round, drafted by the target's `head` on the steps of `grid [n]`, and judged."""

    def __init__(self, device: Device, head: Head, grid: BoolArray) -> None:
        self._device, self._head, self._grid = device, head, grid
        self._recorded: OrderedDict[tuple[object, ...], Redraft] = OrderedDict()

    def __call__(
        self,
        of: Round,
        rows: IntArray,
        guidance: FloatArray,
        start: FloatArray,
        noise: FloatArray,
        begin: IntArray,
    ) -> tuple[Proposal, FloatArray, IntArray]:
        """What is drafted for K `rows` of the round from `start [K, D]` before transition `begin [K]`, and judged.

        `guidance [G, K]`, `noise [K, n, D]` by transition. What the target says are its means `[K, n, D]`. Before
        `begin` they and the draft's are 0, and paths mean nothing. Last come the sequential head calls `[K]`.
        """
        n, dim = self._head.chain.length, self._head.token_dim
        length = self._device.padded(n - int(begin.min()), n)
        path, mean = np.zeros((len(rows), n + 1, dim), np.float32), np.zeros((len(rows), n, dim), np.float32)
        target_mean = mean.copy()
        size = self._head.paths_per_call(len(guidance))
        for part in (slice(i, i + size) for i in range(0, len(rows), size)):
            count = self._device.padded(len(rows[part]), min(of.padded, size))
            some = rows[part], guidance[:, part], start[part], noise[part], begin[part]
            drafted = self._one_call(of, count, length, *some)
            for to, made in zip((path, mean, target_mean), drafted, strict=True):
                to[part, n - length :] = made
        steps = np.arange(n)
        before = steps < begin[:, None]
        mean[before], target_mean[before] = 0, 0
        calls = 1 + (self._grid & (steps > begin[:, None])).sum(axis=1)
        return Proposal(ChainNoise(start, noise), Trajectory(path, mean)), target_mean, calls

    def _one_call(
        self,
        of: Round,
        count: int,
        length: int,
        rows: IntArray,
        guidance: FloatArray,
        start: FloatArray,
        noise: FloatArray,
        begin: IntArray,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """K rows among `count` padded ones: path `[K, length + 1, D]`, means of draft and target `[K, length, D]`."""
        here = np.minimum(np.arange(count), len(rows) - 1)
        step = self._step(of, len(guidance), count, length)
        if step.taken is None:
            step.z_row.reshape(len(guidance), -1)[:] = of.z_rows[:, rows[here]]
        else:
            last = np.arange(noise.shape[1])[-length:, None]
            step.taken.reshape(length, -1)[:] = last * of.padded + of.where[rows[here]]
        step.guidance[:] = guidance[:, here]
        step.fill(start[here], noise[here], begin[here], self._grid)
        step.launch()
        self._device.wait()
        path, mean, target_mean = (array[: len(rows)] for array in (step.path, step.mean, step.target_mean))
        require_finite(path[:, -1], "denoise_step")
        require_finite(target_mean, "log_density")
        return path, mean, target_mean

    def _step(self, of: Round, branches: int, count: int, length: int) -> Redraft:
        """Recorded when it is first needed; of what has not been needed for long the recordings go."""
        source = of.modulation
        # What it reads are arrays of the round's own recording: another one's have other addresses.
        at = None if source is None else (source.ctypes.data, source.shape)
        key = (of.ask, at, branches, count, length)
        if key not in self._recorded:
            self._recorded[key] = make_redraft(
                self._device, self._head, of.ask.z, source, branches, count, length, self._grid
            )
        self._recorded.move_to_end(key)
        if len(self._recorded) > self._device.kept_shapes:
            self._recorded.popitem(last=False)
        return self._recorded[key]
