"""Chains of many rows as calls on static buffers, to be recorded with what comes before and after them.

There are two ways to run chains:

- `FullChains` calls the head at every step.
- `StridedChains` calls it at the steps of a mask, and holds the prediction x̂₀ in between: so a draft saves calls.

In both, rows may begin at transitions of their own, and so finish chains that were cut off (`FullChains`), or draft
what is left of them (`StridedChains`): a draft of a whole chain is the draft of a suffix that begins at transition 0.
For a suffix, n stands in the shapes below for its own number of transitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.decode.head import Head
from specdec_rt.types import Array, BoolArray, IntArray

__all__ = ["CallBuffers", "ChainArrays", "FullChains", "StridedChains"]


@dataclass(frozen=True, eq=False)
class ChainArrays:
    """What R chains begin with, and what they leave; row by row, as `path_means` reads it."""

    guidance: Array
    """`[G, R]`"""
    normals: Array
    """`[R, n + 1, D]`: where each chain starts, then the noise of its transitions"""
    path: Array
    """`[R, n + 1, D]`"""
    mean: Array
    """`[R, n, D]`"""
    std: Array | None
    """`[R, n, D]`, where the chain learns it"""

    @classmethod
    def make(cls, head: Head, branches: int, rows: int, length: int) -> "ChainArrays":
        """Arrays for R chains of `length` transitions."""
        states, transitions = (rows, length + 1, head.token_dim), (rows, length, head.token_dim)
        shapes = [(branches, rows), states, states, transitions, *([transitions] if head.learned_std else [])]
        guidance, normals, path, mean, *std = (head.device.zeros(shape, np.float32) for shape in shapes)
        return cls(guidance, normals, path, mean, std[0] if std else None)

    def pick(self, rows: slice) -> "ChainArrays":
        """Some of the rows, as views."""
        std = None if self.std is None else self.std[rows]
        return ChainArrays(self.guidance[:, rows], self.normals[rows], self.path[rows], self.mean[rows], std)

    @property
    def drawn(self) -> list[Array]:
        """What the chains leave."""
        return [self.path, self.mean] if self.std is None else [self.path, self.mean, self.std]


class CallBuffers:
    """Static buffers of a head's calls for R rows. Chains use them in turn.

    There may be n + 1 calls: one at each transition, and one before them where each row begins at its own.
    """

    def __init__(self, head: Head, branches: int, rows: int) -> None:
        device, n, dim = head.device, head.chain.length, head.token_dim
        self.z = device.zeros((branches, rows, head.z_dim), np.float32)
        """`[G, R, Z]`"""
        self.guidance = device.zeros((branches, rows), np.float32)
        """`[G, R]`"""
        self.step, self.fixed_step = (device.aligned((n, rows), np.int64) for _ in range(2))
        """`[n, R]` the transition that each call evaluates: of each row its own, or 0 … n - 1 of all rows alike"""
        self.fixed_step[:] = np.arange(n)[:, None]
        device.upload(self.fixed_step)()
        self.noise = device.aligned((n + 1, rows, dim), np.float32)
        """`[n + 1, R, D]` of each transition of a chain or suffix; the last entry is of each row's own first one"""
        self.state = device.aligned((n + 2, rows, dim), np.float32)
        """`[n + 2, R, D]` the state before each call, and after the last"""
        self.mean = device.aligned((n + 1, rows, dim), np.float32)
        """`[n + 1, R, D]` what each call makes; and"""
        self.std = device.aligned((n, rows, dim), np.float32) if head.learned_std else None
        """`[n, R, D]`, where the chain learns it"""
        self.made = [self.state, self.mean, *([] if self.std is None else [self.std])]
        steps = head.capacity.modulation_steps(rows, head.modulation_width, n)
        self.modulation = head.modulation_buffer(branches, rows, steps)
        """`[steps, R, G, M]`, of as many steps at a time as fit"""
        self.own_modulation = device.zeros(self.modulation.shape[1:], np.float32, staged=False)
        """`[R, G, M]`, of each row's own step"""
        self._bound: dict[tuple[int, ...], BoundCall] = {}
        """calls by their number and the addresses of what differs: many chains make the same ones"""

    def evaluate(self, head: Head, call: int, noise: Array, modulation: Array, step: Array) -> BoundCall:
        """Call number `call`, with `noise [R, D]` and `modulation [R, G, M]`, of transitions `step [R]`."""
        key = call, noise.ctypes.data, modulation.ctypes.data, step.ctypes.data
        if key not in self._bound:
            inputs = {"state": self.state[call], "modulation": modulation, "guidance": self.guidance, "step": step}
            inputs |= {"coefficients": head.coefficients, "noise": noise}
            std = {} if self.std is None else {"std": self.std[call]}
            outputs = {"next_state": self.state[call + 1], "mean": self.mean[call], **std}
            self._bound[key] = head.engines.denoise_step.bind(inputs, outputs)
        return self._bound[key]


class _Chains:
    """R chains on conditions that lie in `z [conditions, Z]`."""

    def __init__(self, head: Head, buffers: CallBuffers, z: Array, arrays: ChainArrays) -> None:
        device = head.device
        self._buffers, self._arrays = buffers, arrays
        self.z_row = device.zeros((arrays.guidance.size,), np.int64)
        """`[G R]` the rows of `z` that are the chains' conditions; the host fills it"""
        self.inputs: list[Array] = []
        """what `begin_at` fills"""
        self.calls = [
            device.gather(buffers.z.reshape(len(self.z_row), -1), z, self.z_row),
            device.copy(buffers.guidance, arrays.guidance),
            device.copy(buffers.state[0], arrays.normals[:, 0]),
            device.copy(buffers.noise[: arrays.mean.shape[1]], arrays.normals[:, 1:].swapaxes(0, 1)),
        ]


class FullChains(_Chains):
    """R chains that call the head at every step, the first `n` of `arrays`: call i evaluates row r's i-th transition.

    With `own_begin`, `begin_at` says where each row begins. A row that begins late has its last state in the path
    earlier than others; what follows in its path then means nothing.
    """

    def __init__(
        self, head: Head, buffers: CallBuffers, z: Array, arrays: ChainArrays, *, own_begin: bool = False
    ) -> None:
        super().__init__(head, buffers, z, arrays)
        device, count = head.device, arrays.mean.shape[1]
        self._transitions = head.chain.length
        self.left_out, self.left_out_modulation = np.zeros(0, np.int64), buffers.modulation[:0]
        self._step = (buffers.step if own_begin else buffers.fixed_step)[:count]
        self._made: list[tuple[slice, Array]] = []
        for made in _slices(count, len(buffers.modulation)):
            steps = np.arange(made.start, made.stop)
            modulation_steps, modulate = head.modulate(buffers.z, buffers.modulation[: len(steps)], steps)
            self._made.append((made, modulation_steps))
            self.calls.append(modulate)
            for call in range(made.start, made.stop):
                noise, modulation = buffers.noise[call], buffers.modulation[call - made.start]
                self.calls.append(buffers.evaluate(head, call, noise, modulation, self._step[call]))
        self.token = buffers.state[count]
        """`[R, D]`, in one piece"""
        for to, of in zip(arrays.drawn, buffers.made, strict=True):
            self.calls.append(device.copy(to, of[: to.shape[1]].swapaxes(0, 1)))
        self.inputs = [self._step, *(steps for _, steps in self._made)] if own_begin else []

    def begin_at(self, begin: IntArray) -> None:
        """Row r begins before transition `begin[r]` of the whole chain."""
        self._step[:] = np.minimum(begin + np.arange(len(self._step))[:, None], self._transitions - 1)
        for made, steps in self._made:
            steps.reshape(made.stop - made.start, -1)[:] = self._step[made]


class StridedChains(_Chains):
    """R chains, or suffixes of them, that call the head at the steps of `step_mask [n]` and hold x̂₀ in between.

    Without `own_begin` all rows begin at the mask's first step, which is the first of all. With it, `begin_at` says
    where each row begins; there the head is called first, and then at the steps of the mask that come after. Before a
    row begins its path is its start, and its means mean nothing.

    With `own_begin` or `keep_left_out`, and where it fits, modulation is made of all steps at once: those of the mask
    first, then those that the mask leaves out, for `left_out_modulation`.
    """

    def __init__(
        self,
        head: Head,
        buffers: CallBuffers,
        z: Array,
        arrays: ChainArrays,
        step_mask: BoolArray,
        *,
        own_begin: bool = False,
        keep_left_out: bool = False,
    ) -> None:
        super().__init__(head, buffers, z, arrays)
        device, rows, room = head.device, len(arrays.path), len(buffers.modulation)
        self.left_out = np.flatnonzero(~step_mask)
        """transitions, numbered from the suffix's first, that the mask leaves out"""
        self._masked, self._length = np.flatnonzero(step_mask), len(step_mask)
        self._first = head.chain.length - self._length
        whole = (own_begin or keep_left_out) and self._length <= room
        made = np.concatenate([self._masked, self.left_out]) if whole else self._masked
        self.left_out_modulation = buffers.modulation[len(self._masked) : self._length] if whole else None
        """`[left out, R, G, M]`, there when the calls are done; None where it was not made"""
        self._place_of_step = np.argsort(made)

        assert whole or not own_begin, "more rows than paths_per_call"
        assert own_begin or step_mask[0], "rows without a first call"
        assert arrays.std is None, "a step that is left out has no learned std"
        calls = len(self._masked) + own_begin
        self.token = buffers.state[calls]
        """`[R, D]`, in one piece"""
        self._window = tuple(device.aligned((calls, rows), np.int64) for _ in range(2))
        self._coefficients = head.constant(head.chain.hold_coefficients[self._first :])
        self.calls.append(device.copy(arrays.path, arrays.normals[:, :1]))
        for part in _slices(len(made), room):
            to = buffers.modulation[: part.stop - part.start]
            self.calls.append(head.modulate(buffers.z, to, self._first + made[part])[1])
            if own_begin:
                self._call_at_own_begin(head)
            for masked in range(part.start, min(part.stop, len(self._masked))):
                self._call_at(head, masked + own_begin, masked - part.start, int(self._masked[masked]))
        if not own_begin:
            self._fill_windows(np.zeros(rows, np.int64), np.tile(self._masked[:, None], rows))
            device.upload(*self._window)()

    def begin_at(self, begin: IntArray) -> None:
        """Row r begins before transition `begin[r]` of the whole chain."""
        own, rows = begin - self._first, np.arange(len(begin))
        step, modulation_row, noise_row, *_ = self.inputs
        step[:] = begin
        modulation_row[:] = self._place_of_step[own] * len(rows) + rows
        noise_row[:] = rows * (self._length + 1) + 1 + own
        self._fill_windows(own, np.concatenate([own[None], np.tile(self._masked[:, None], len(rows))]))

    def _fill_windows(self, begin: IntArray, step: IntArray) -> None:
        """Each call's window: from its step, `step [E, R]`, to the next one of the mask; none before a row begins."""
        begins, ends = self._window
        following = np.append(self._masked, self._length)[np.searchsorted(self._masked, step, side="right")]
        begins[:] = step
        ends[:] = np.where((step > begin) | (np.arange(len(step)) == 0)[:, None], following, step)

    def _call_at_own_begin(self, head: Head) -> None:
        """Each row's first call, on modulation and noise of its own step."""
        device, buffers, normals = head.device, self._buffers, self._arrays.normals
        (rows, dim), modulation = buffers.state.shape[1:], buffers.own_modulation
        modulation_row, noise_row = (device.zeros((rows,), np.int64) for _ in range(2))
        made = buffers.modulation.reshape(-1, modulation[0].size)
        self.calls += [
            device.gather(modulation.reshape(rows, -1), made, modulation_row),
            device.gather(buffers.noise[-1], normals.reshape(-1, dim), noise_row),
            buffers.evaluate(head, 0, buffers.noise[-1], modulation, buffers.step[0]),
            self._hold(head, 0),
        ]
        self.inputs = [buffers.step[0], modulation_row, noise_row, *self._window]

    def _call_at(self, head: Head, call: int, place: int, step: int) -> None:
        """A call of all rows at one step of the mask, on the modulation at `place`."""
        buffers = self._buffers
        noise, modulation, steps = (
            buffers.noise[step],
            buffers.modulation[place],
            buffers.fixed_step[self._first + step],
        )
        self.calls += [buffers.evaluate(head, call, noise, modulation, steps), self._hold(head, call)]

    def _hold(self, head: Head, call: int) -> BoundCall:
        """What follows the call on its prediction x̂₀."""
        buffers, arrays, (begins, ends) = self._buffers, self._arrays, self._window
        evaluated = buffers.state[call], buffers.state[call + 1], buffers.mean[call]
        window, coefficients = (begins[call], ends[call]), self._coefficients
        to = arrays.path, arrays.mean, arrays.normals
        return head.device.linear_recurrence(*to, evaluated, window, coefficients)


def _slices(count: int, size: int) -> Sequence[slice]:
    """`count` things, so many at a time."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
