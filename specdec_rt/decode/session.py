"""The launches of decoding: what a pair of models does without the host in between, recorded on static buffers.

A round is two launches: the draft block (γ times backbone and chains, each fed with the tokens before it), and the
verification. Where tokens are rejected, others follow: one finishes their chains step by step, or one drafts and judges
what is left of them. On a GPU each launch is a captured CUDA graph. The host fills static arrays before a launch, and
reads others after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import BoundCall, Device
from specdec_rt.decode.chain_plan import CallBuffers, ChainArrays, FullChains, StridedChains
from specdec_rt.decode.head import Head, Trajectory, require_finite
from specdec_rt.decode.model import Model
from specdec_rt.decode.padded_rows import PaddedRows, row_slices
from specdec_rt.decode.path_means import judge_own_paths, judge_paths
from specdec_rt.families.backbone import BackboneCall
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["ChainSuffixes", "Session", "Speculation"]

Prepared = tuple[BackboneCall, IntArray]
"""a filled call, and which rows of its z belong to the rows that it was filled for"""


@dataclass(frozen=True)
class Speculation:
    """What was drafted, and what the target says of it: R rows. The next round overwrites it."""

    drawn: Trajectory
    """under the draft's transitions"""
    target: Trajectory
    """its means at the same states; in `paper` mode the target's own chains on the draft's noise"""
    begin: IntArray | None = None
    """`[R]` the transition that each row's draft begins at; None: the first"""


@dataclass(frozen=True)
class ChainSuffixes:
    """What is left of the chains of J rejected rows of the last round."""

    rows: IntArray
    """`[J]` which rows of the round"""
    guidance: FloatArray
    """`[G, J]`"""
    start: FloatArray
    """`[J, D]` the state before transition"""
    begin: IntArray
    """`[J]`"""
    noise: FloatArray
    """`[J, n, D]` numbered like the whole chain's transitions"""

    def pick(self, part: IntArray | slice) -> "ChainSuffixes":
        """Some of them."""
        rows, guidance, start = self.rows[part], self.guidance[:, part], self.start[part]
        return ChainSuffixes(rows, guidance, start, self.begin[part], self.noise[part])


@dataclass(frozen=True, eq=False)
class _Block:
    """AR steps of one model, one after the other."""

    token_buffer: Array
    """`[A, L, D]`"""
    token_row: Array
    """`[R]` the row of the token buffer that each drawn token goes to"""
    arrays: ChainArrays
    chains: list[FullChains | StridedChains]
    """of each AR step"""
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Judging:
    """The target's word on a block, or on suffixes that the launch drafts first."""

    z_rows: Sequence[tuple[slice, Array]]
    """of which rows, and `[G r]` where their conditions lie"""
    drawn: ChainArrays
    target: ChainArrays
    chains: FullChains | StridedChains
    launch: BoundCall


class Session:
    """A target and a draft with their buffers, for one batch at a time.

    `target` is None where the draft decodes alone; `draft` is None where the target's own head drafts, or nothing
    does. `draft_step_mask [n]` says where a draft calls its head (None: at every step), `resume_step_mask [n]` where
    the target calls its own to draft what is left of a chain. With `shared_noise` the target is asked for chains of
    its own on the draft's noise (`paper` mode), instead of its means along the draft's.
    """

    def __init__(
        self,
        device: Device,
        *,
        target: Model | None,
        draft: Model | None,
        draft_step_mask: BoolArray | None = None,
        resume_step_mask: BoolArray | None = None,
        shared_noise: bool = False,
    ) -> None:
        self.device, self.target, self.draft = device, target, draft
        self._draft_step_mask = None if draft_step_mask is None or draft_step_mask.all() else draft_step_mask
        self._resume_step_mask, self._shared_noise = resume_step_mask, shared_noise
        self._last_round: tuple[BackboneCall, IntArray, int]
        """the target's backbone call, the rows `[G, R]` of its z, and how many rows were padded to"""
        kept = lru_cache(maxsize=device.kept_shapes)
        self._buffers = kept(CallBuffers.make)
        self._block = kept(self._record_block)
        self._verification = kept(self._record_verification)
        self._suffixes = kept(self._record_suffixes)
        self._catch_up = kept(self._record_catch_up)

    @property
    def models(self) -> list[Model]:
        """Those that there are, the one whose distribution counts first."""
        return [model for model in (self.target, self.draft) if model is not None]

    @property
    def primary_model(self) -> Model:
        """The model whose distribution counts: the target, or the draft where that decodes alone."""
        return self.models[0]

    # --- launches ---------------------------------------------------------------------------------------

    def draw(
        self, model: Model, tokens: FloatArray, positions: PositionBatch, normals: FloatArray, guidance: FloatArray
    ) -> Trajectory:
        """The next AR step of each image by `model` alone.

        `tokens [A, L, D]` are committed, `normals [R, n + 1, D]`, `guidance [G, R]`.
        """
        rows, prepared = PaddedRows.of(positions, self.device), [model.backbone.prepare(positions)]
        block = self._block(model, model is self.draft, (prepared[0][0],), tokens.shape[:2], rows.counts)
        _fill_block(block, prepared, rows, positions, tokens, normals, guidance)
        block.launch()
        self.device.wait()
        return _drawn(block.arrays, rows.where)

    def speculate(
        self, tokens: FloatArray, positions: PositionBatch, normals: FloatArray, guidance: FloatArray
    ) -> Speculation:
        """Draft the tokens of these positions, and let the target judge them. Arguments as in `draw`."""
        assert self.target is not None
        rows = PaddedRows.of(positions, self.device)
        call, z_rows = self.target.backbone.prepare(positions)
        prepared = [(call, z_rows)] if self.draft is None else _prepare_each(self.draft, positions)
        calls = tuple(each for each, _ in prepared)
        block = self._block(self.draft or self.target, True, calls, tokens.shape[:2], rows.counts)
        verification = self._verification(call, block)
        _fill_block(block, prepared, rows, positions, tokens, normals, guidance)
        for part, z_row in verification.z_rows:
            z_row[:] = z_rows[:, rows.source][:, part].ravel()
        block.launch()
        verification.launch()
        self.device.wait()
        self._last_round = call, z_rows, sum(rows.counts)
        drawn, target = (_drawn(arrays, rows.where) for arrays in (block.arrays, verification.target))
        require_finite(target.mean, "path_means")
        return Speculation(drawn, target)

    def finish(self, left: ChainSuffixes) -> tuple[FloatArray, FloatArray]:
        """Tokens and their means `[J, D]`: the target's chains to their ends, step by step."""
        n, each = left.noise.shape[1], np.arange(len(left.rows))
        done = self._launch_suffixes(left, judged=False).drawn
        token, mean = done.path[each, n - left.begin], done.mean[each, n - 1 - left.begin]
        require_finite(token, "denoise_step")
        return token, mean

    def resume(self, left: ChainSuffixes) -> tuple[Speculation, IntArray]:
        """Draft the suffixes by the target's own head on few steps, and let it judge them.

        Up to where a row begins its path is its start, and both means are 0. Returns the sequential head calls of
        each row `[J]`, too.
        """
        assert self.target is not None
        assert self._resume_step_mask is not None
        head, (_, n, dim) = self.target.head, left.noise.shape
        path = np.repeat(left.start[:, None], n + 1, axis=1)
        mean, target_mean = (np.zeros((len(path), n, dim), np.float32) for _ in range(2))
        most = head.paths_per_call(len(left.guidance))
        for first in range(0, len(path), most):
            part = slice(first, first + most)
            made, rows = self._launch_suffixes(left.pick(part), judged=True), len(path[part])
            for whole, suffix in ((path, made.drawn.path), (mean, made.drawn.mean), (target_mean, made.target.mean)):
                whole[part, len(whole[0]) - len(suffix[0]) :] = suffix[:rows]
        before = np.arange(n) < left.begin[:, None]
        mean[before], target_mean[before] = 0, 0
        require_finite(path[:, -1], "denoise_step")
        require_finite(target_mean, "path_means")
        calls = 1 + (self._resume_step_mask & (np.arange(n) > left.begin[:, None])).sum(axis=1)
        return Speculation(Trajectory(path, mean), Trajectory(path, target_mean), left.begin), calls

    def catch_up(self, order: IntArray, known: IntArray, tokens: FloatArray, steps: int) -> int:
        """Let the draft take in `tokens [A, L, D]` of the first AR steps; returns its backbone calls per image.

        `order [A, L]` and `known [T + 1]` as in `PositionBatch`.
        """
        assert self.draft is not None
        call = self.draft.backbone.catch_up(order, known, steps)
        if call is None:
            return 0
        token_buffer, launch = self._catch_up(call, tokens.shape)
        token_buffer[:] = tokens
        launch()
        self.device.wait()
        return 1

    def _launch_suffixes(self, left: ChainSuffixes, *, judged: bool) -> _Judging:
        """Finish the chains, or draft and judge what is left of them; rows stand first among padded ones."""
        (call, z_rows, padded), count, n = self._last_round, len(left.rows), left.noise.shape[1]
        rows = np.minimum(np.arange(self.device.bucketed(count, padded)), count - 1)
        left = left.pick(rows)
        length = self.device.bucketed(n - int(left.begin.min()), n)
        # Chains that are finished all take their first step at once; those that are drafted all take their last.
        first = left.begin[:, None] if not judged else np.full((len(rows), 1), n - length)
        step = self._suffixes(call, len(left.guidance), len(rows), length, judged)
        step.drawn.guidance[:], step.drawn.normals[:, 0] = left.guidance, left.start
        step.drawn.normals[:, 1:] = left.noise[
            np.arange(len(rows))[:, None], np.minimum(first + np.arange(length), n - 1)
        ]
        step.chains.z_row[:] = z_rows[:, left.rows].ravel()
        step.chains.begin_at(left.begin)
        step.launch()
        self.device.wait()
        return step

    # --- what is recorded -------------------------------------------------------------------------------

    def _record_block(
        self,
        model: Model,
        drafting: bool,
        calls: tuple[BackboneCall, ...],
        shape: tuple[int, int],
        counts: tuple[int, ...],
    ) -> _Block:
        """AR steps of one model: `shape` is (A, L), `counts` are the rows of each step."""
        device, head, branches, rows = self.device, model.head, model.backbone.branches, sum(counts)
        token_buffer, token_row = device.zeros((*shape, head.token_dim), np.float32), device.zeros((rows,), np.int64)
        arrays = ChainArrays.make(head, branches, rows, head.chain.length)
        step_mask = self._draft_step_mask if drafting else None
        # A target that drafts for itself judges the steps it leaves out on modulation that it makes with the rest.
        judged = self.draft is None
        chains, work = [], []
        for call, part in zip(calls, row_slices(counts), strict=True):
            drawn = self._chains(head, call.z, arrays.pick(part), step_mask, judged=judged)
            stored = device.scatter(token_buffer.reshape(-1, head.token_dim), drawn.token, token_row[part])
            work += [*call.run(device, token_buffer), *drawn.calls, stored]
            chains.append(drawn)
        filled = [token_buffer, arrays.guidance, arrays.normals, token_row]
        filled += [array for call in calls for array in call.inputs] + [each.z_row for each in chains]
        launch = device.record([device.upload(*filled), *work, device.download(*arrays.drawn)])
        return _Block(token_buffer, token_row, arrays, chains, launch)

    def _record_verification(self, call: BackboneCall, block: _Block) -> _Judging:
        device, drawn = self.device, block.arrays
        assert self.target is not None
        head = self.target.head
        # Where the target drafts for itself its backbone has been called already.
        asked = [] if self.draft is None else [device.upload(*call.inputs), *call.run(device, block.token_buffer)]
        if self._shared_noise:
            own = drawn.beside(head)
            chains = self._chains(head, call.z, own, None)
            z_rows, work = [(slice(None), chains.z_row)], [device.upload(chains.z_row), *chains.calls]
        else:
            own, chains = drawn.judged(head), block.chains[0]
            fits = len(own.path) <= head.paths_per_call(len(own.guidance))
            if self.draft is None and fits and chains.left_out_modulation is not None:
                z_rows, work = [], judge_own_paths(head, chains, drawn, own.mean)
            else:
                z_rows, work = judge_paths(head, call.z, own)
                work = [device.upload(*(z_row for _, z_row in z_rows)), *work]
        return _Judging(z_rows, drawn, own, chains, device.record([*asked, *work, device.download(*own.drawn)]))

    def _record_suffixes(self, call: BackboneCall, branches: int, rows: int, length: int, judged: bool) -> _Judging:
        assert self.target is not None
        device, head = self.device, self.target.head
        arrays = ChainArrays.make(head, branches, rows, length)
        step_mask = self._resume_step_mask[-length:] if judged and self._resume_step_mask is not None else None
        chains = self._chains(head, call.z, arrays, step_mask, own_begin=True)
        own = arrays.judged(head) if judged else arrays
        work = judge_own_paths(head, chains, arrays, own.mean) if judged else []
        upload = device.upload(arrays.guidance, arrays.normals, chains.z_row, *chains.inputs)
        download = device.download(*arrays.drawn, *([own.mean] if judged else []))
        return _Judging([], arrays, own, chains, device.record([upload, *chains.calls, *work, download]))

    def _chains(
        self,
        head: Head,
        z: Array,
        arrays: ChainArrays,
        step_mask: BoolArray | None,
        *,
        own_begin: bool = False,
        judged: bool = False,
    ) -> FullChains | StridedChains:
        buffers = self._buffers(head, *arrays.guidance.shape)
        if step_mask is None:
            return FullChains(head, buffers, z, arrays, own_begin=own_begin)
        return StridedChains(head, buffers, z, arrays, step_mask, own_begin=own_begin, keep_left_out=judged)

    def _record_catch_up(self, call: BackboneCall, shape: tuple[int, ...]) -> tuple[Array, BoundCall]:
        device = self.device
        token_buffer = device.zeros(shape, np.float32)
        return token_buffer, device.record([device.upload(token_buffer, *call.inputs), *call.run(device, token_buffer)])


def _prepare_each(draft: Model, positions: PositionBatch) -> list[Prepared]:
    """A backbone call for each AR step, in buffers of its own."""
    return [draft.backbone.prepare(positions.at(offset), offset) for offset in range(positions.length)]


def _fill_block(
    block: _Block,
    prepared: list[Prepared],
    rows: PaddedRows,
    positions: PositionBatch,
    tokens: FloatArray,
    normals: FloatArray,
    guidance: FloatArray,
) -> None:
    """Fill what the host gives to a block; arguments as in `Session.draw`."""
    block.token_buffer[:] = tokens
    block.arrays.normals[:], block.arrays.guidance[:] = normals[rows.source], guidance[:, rows.source]
    block.token_row[:] = (positions.image_index * tokens.shape[1] + positions.position)[rows.source]
    z_rows = np.concatenate([z_row for _, z_row in prepared], axis=1)[:, rows.source]
    for chains, part in zip(block.chains, row_slices(rows.counts), strict=True):
        chains.z_row[:] = z_rows[:, part].ravel()


def _drawn(arrays: ChainArrays, rows: IntArray | slice) -> Trajectory:
    """Some rows of what a launch left."""
    path = arrays.path[rows]
    require_finite(path[:, -1], "denoise_step")
    return Trajectory(path, arrays.mean[rows], None if arrays.std is None else arrays.std[rows])
