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

from specdec_rt.backends.base import BoundCall, Device
from specdec_rt.chain import Chain
from specdec_rt.decode.chain import Head, Trajectory, require_finite
from specdec_rt.decode.draft import ChainNoise, Proposal
from specdec_rt.families.backbone import Ask
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["LEAST", "Redraft", "Redrafts", "Round", "evaluations", "held_factors", "make_redraft"]

LEAST = 24
"""Transitions left for which it pays: a draft, its verification and a verdict have to be less than so many calls."""


@dataclass(frozen=True, eq=False)
class Redraft:
    """Buffers of R rows for the last L transitions of a chain; what is drafted and judged lies in them after a launch.

    Steps are numbered from the first of the L.
    """

    taken: Array | None
    """`[L R]` where the round has the modulation of each step and row; None: modulation is made of z"""
    z_rows: list[tuple[slice, Array]]
    """of which rows, and `[G r]` where their z lies: for the draft, and for each part that is judged"""
    made_steps: list[tuple[slice, Array]]
    """of which evaluations, and `[c R]` what their modulation is made of"""
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
    """`[k, R]` where their modulation lies, if it was taken"""
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
        for part, steps in self.made_steps:
            steps[:] = self.step[part].ravel()
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
    calls = 1 + int(grid[-length:].sum())

    def zeros(*shape: int) -> Array:
        return device.zeros(shape, np.float32)

    guidance, state = zeros(branches, rows), zeros(rows, dim)
    noise, mean, target_mean = (zeros(rows, length, dim) for _ in range(3))
    path = zeros(rows, length + 1, dim)
    next_state, first_mean, step_noise = (zeros(rows, dim) for _ in range(3))
    windows, *indices = (device.aligned((size, rows), np.int64) for size in (calls + 1, calls, calls, calls))
    step, modulation_row, noise_row = indices
    factors = device.zeros((length, 5), np.float64)
    factors[:] = held_factors(chain)[-length:]
    device.upload(factors)()

    z_rows: list[tuple[slice, Array]] = []
    drawing: list[BoundCall] = []

    def conditions_of(part: slice, conditions: Array) -> BoundCall:
        """Gathers `conditions [G, r, Z]` of some rows."""
        at = device.zeros((branches * conditions.shape[1],), np.int64)
        z_rows.append((part, at))
        return device.gather(conditions.reshape(len(at), -1), z, at)

    modulations: list[tuple[list[BoundCall], Array]] = []  # of each evaluation: what makes it, and where it lies
    made_steps: list[tuple[slice, Array]] = []
    whole = taken = None
    if source is None:
        conditions = zeros(branches, rows, head.z_dim)
        drawing.append(conditions_of(slice(0, rows), conditions))
        modulations, made_steps = _made_in_time(head, conditions, calls)
    else:
        # As much room as the round's own: one size for whatever rows and steps are taken of it.
        room = head.room(branches, source.shape[1], chain.length, taken=True)
        whole = room.reshape(-1, branches, room.shape[-1])[: length * rows].reshape(length, rows, branches, -1)
        taken = device.zeros((length * rows,), np.int64)
        of_round = source.reshape(source.shape[0] * source.shape[1], -1)
        drawing.append(device.gather(whole.reshape(len(taken), -1), of_round, taken))
        of_step = zeros(rows, branches, whole.shape[-1])
        for each in range(calls):
            of_rows = device.gather(of_step.reshape(rows, -1), whole.reshape(len(taken), -1), modulation_row[each])
            modulations.append(([of_rows], of_step))
    for each, (made, modulation) in enumerate(modulations):
        inputs = {
            "state": state,
            "modulation": modulation,
            "guidance": guidance,
            "step": step[each],
            "noise": step_noise,
        }
        window = windows[each], windows[each + 1]
        drawing += [
            *made,
            device.gather(step_noise, noise.reshape(-1, dim), noise_row[each]),
            head.transition(inputs, {"next_state": next_state, "mean": first_mean}),
            device.recur_rows(path, mean, noise, state, (next_state, first_mean), window, factors),
        ]
    for part in head.density(branches, path, target_mean, whole):
        if part.z is not None:
            drawing.append(conditions_of(part.rows, part.z))
        drawing += [device.copy(part.guidance, guidance[:, part.rows]), *part.calls]
    staged = [guidance, state, path, noise, windows, *indices, *(at for _, at in (*z_rows, *made_steps))]
    if taken is not None:
        staged.append(taken)
    return Redraft(
        taken=taken,
        z_rows=z_rows,
        made_steps=made_steps,
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
        launch=device.record([device.upload(*staged), *drawing, device.download(path, mean, target_mean)]),
    )


def _made_in_time(
    head: Head, conditions: Array, calls: int
) -> tuple[list[tuple[list[BoundCall], Array]], list[tuple[slice, Array]]]:
    """Of each of so many evaluations what makes its modulation, and that `[R, G, M]`; made for several at once.

    Then which evaluations are made together, and the steps `[c R]` that each row is at in them.
    """
    branches, rows, _ = conditions.shape
    room = head.room(branches, rows, head.places(rows, calls))
    found: list[tuple[list[BoundCall], Array]] = []
    steps: list[tuple[slice, Array]] = []
    for first in range(0, calls, len(room)):
        made = room[: min(len(room), calls - first)]
        at, make = head.modulate(conditions, made)
        found += [([make] if place == 0 else [], made[place]) for place in range(len(made))]
        steps.append((slice(first, first + len(made)), at))
    return found, steps


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
    places: IntArray
    """`[n]` where each transition's lies in it"""


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
        length = self._device.bucketed(n - int(begin.min()), n)
        count = self._device.bucketed(len(rows), of.padded)
        here = np.minimum(np.arange(count), len(rows) - 1)
        step = self._step(of, len(guidance), count, length)
        steps = np.arange(n)
        if step.taken is not None:
            step.taken.reshape(length, -1)[:] = of.places[-length:, None] * of.padded + of.where[rows[here]]
        for part, at in step.z_rows:
            at.reshape(len(guidance), -1)[:] = of.z_rows[:, rows[here[part]]]
        step.guidance[:] = guidance[:, here]
        step.fill(start[here], noise[here], begin[here], self._grid)
        step.launch()
        self._device.wait()
        path, mean = np.zeros((len(rows), n + 1, dim), np.float32), np.zeros((len(rows), n, dim), np.float32)
        target_mean = mean.copy()
        for to, made in zip((path, mean, target_mean), (step.path, step.mean, step.target_mean), strict=True):
            to[:, n - length :] = made[: len(rows)]
        before = steps < begin[:, None]
        mean[before], target_mean[before] = 0, 0
        require_finite(path[:, -1], "denoise_step")
        require_finite(target_mean, "path_means")
        calls = 1 + (self._grid & (steps > begin[:, None])).sum(axis=1)
        return Proposal(ChainNoise(start, noise), Trajectory(path, mean)), target_mean, calls

    def _step(self, of: Round, branches: int, count: int, length: int) -> Redraft:
        """Recorded when it is first needed; of what has not been needed for long the recordings go."""
        source = of.modulation
        # It reads arrays of the round's own recording: another one's have other addresses.
        reads = of.ask if source is None else (source.ctypes.data, source.shape)
        key = (reads, branches, count, length)
        if key not in self._recorded:
            self._recorded[key] = make_redraft(
                self._device, self._head, of.ask.z, source, branches, count, length, self._grid
            )
        self._recorded.move_to_end(key)
        if len(self._recorded) > self._device.kept_shapes:
            self._recorded.popitem(last=False)
        return self._recorded[key]
