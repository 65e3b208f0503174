"""The launches of decoding: what a pair of models does without the host in between, recorded on static buffers.

A round is two launches: the draft block (γ times backbone and chains, each fed with the tokens before it), and the
verification. Where tokens are rejected, others follow: one finishes their chains step by step, or one drafts and judges
what is left of them. On a GPU each launch is a captured CUDA graph. The host fills static arrays before a launch, and
reads others after it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import BoundCall, Device
from specdec_rt.decode.chain_plan import CallBuffers, ChainArrays, FullChains, StridedChains
from specdec_rt.decode.head import Head, Trajectory, require_finite
from specdec_rt.decode.model import Model
from specdec_rt.decode.path_means import PathMeans, own_path_means
from specdec_rt.decode.staging import PaddedRows, row_slices
from specdec_rt.families.backbone import BackboneCall
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["Session", "Speculation"]


@dataclass(frozen=True)
class Speculation:
    """What a round drafted, and what the target says of it: R rows. The next round overwrites it."""

    drawn: Trajectory
    """under the draft's transitions"""
    target: Trajectory
    """its means at the same states; in `paper` mode the target's own chains on the draft's noise"""


@dataclass(frozen=True, eq=False)
class _Block:
    """AR steps of one model, one after the other."""

    token_buffer: Array
    """`[A, L, D]`"""
    arrays: ChainArrays
    chains: list[FullChains | StridedChains]
    """of each AR step"""
    token_row: Array
    """`[R]` the row of the token buffer that each drawn token goes to"""
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Verification:
    z_rows: list[tuple[slice, Array]]
    """of which rows, and `[G r]` where their conditions lie"""
    arrays: ChainArrays
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Chains:
    """Chains that go on, or are drafted, from states that the host gives."""

    arrays: ChainArrays
    target_mean: Array
    """`[R, n, D]` where they are judged; else empty"""
    chains: FullChains | StridedChains
    launch: BoundCall


@dataclass(frozen=True)
class _LastRound:
    """Where the conditions of the last round's R rows lie: rows `z_rows [G, R]` of what a backbone call gave."""

    call: BackboneCall
    z_rows: IntArray
    padded: int


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
        self.device = device
        self.target, self.draft = target, draft
        self._draft_step_mask = None if draft_step_mask is None or draft_step_mask.all() else draft_step_mask
        self._resume_step_mask = resume_step_mask
        self._shared_noise = shared_noise
        self._last_round: _LastRound | None = None
        kept = lru_cache(maxsize=device.kept_shapes)
        self._buffers = kept(CallBuffers.make)
        self._block = kept(self._record_block)
        self._verification = kept(self._record_verification)
        self._finish = kept(self._record_finish)
        self._resume = kept(self._record_resume)
        self._catch_up = kept(self._record_catch_up)

    @property
    def models(self) -> list[Model]:
        """Those that there are, the one whose distribution counts first."""
        return [model for model in (self.target, self.draft) if model is not None]

    @property
    def primary_model(self) -> Model:
        """The model whose distribution counts: the target, or the draft where that decodes alone."""
        return self.models[0]

    @property
    def proposer(self) -> Model:
        """The model that drafts: a draft, or the target itself."""
        return self.models[-1]

    # --- launches ---------------------------------------------------------------------------------------

    def draw(
        self, model: Model, tokens: FloatArray, positions: PositionBatch, normals: FloatArray, guidance: FloatArray
    ) -> Trajectory:
        """The next AR step of each image by `model` alone.

        `tokens [A, L, D]` are committed, `normals [R, n + 1, D]`, `guidance [G, R]`.
        """
        rows = PaddedRows.of(positions, self.device)
        prepared = [model.backbone.prepare(positions)]
        drafting = model is self.draft
        block = self._launch_block(model, drafting, prepared, rows, positions, tokens, normals, guidance)
        self.device.wait()
        return _drawn(block.arrays, rows.where)

    def speculate(
        self, tokens: FloatArray, positions: PositionBatch, normals: FloatArray, guidance: FloatArray
    ) -> Speculation:
        """Draft the tokens of these positions, and let the target judge them. Arguments as in `draw`."""
        assert self.target is not None
        rows = PaddedRows.of(positions, self.device)
        prepared = self.target.backbone.prepare(positions)
        drafted = [prepared] if self.draft is None else _prepare_each(self.draft, positions)
        block = self._launch_block(self.proposer, True, drafted, rows, positions, tokens, normals, guidance)
        call, z_rows = prepared
        verification = self._verification(call, block)
        for part, z_row in verification.z_rows:
            z_row[:] = z_rows[:, rows.source][:, part].ravel()
        verification.launch()
        self.device.wait()
        self._last_round = _LastRound(call, z_rows, sum(rows.counts))
        drawn, target = (_drawn(arrays, rows.where) for arrays in (block.arrays, verification.arrays))
        require_finite(target.mean, "path_means")
        return Speculation(drawn, target)

    def finish(
        self, rows: IntArray, guidance: FloatArray, start: FloatArray, noise: FloatArray, begin: IntArray
    ) -> tuple[FloatArray, FloatArray]:
        """Tokens and their means `[J, D]`: the target's chains of `rows [J]` of the last round, step by step.

        They go on from `start [J, D]` before transition `begin [J]`; `guidance [G, J]`, `noise [J, n, D]`.
        """
        last, n = self._last(), noise.shape[1]
        here = self._padded(rows, last)
        length = self.device.bucketed(n - int(begin.min()), n)
        step = self._finish(last.call, len(guidance), len(here), length)
        # A row's noise begins where the row does.
        shifted = np.minimum(begin[here, None] + np.arange(length), n - 1)
        self._fill(step, last, rows[here], guidance[:, here], start[here], noise[here[:, None], shifted])
        step.chains.begin_at(begin[here])
        step.launch()
        self.device.wait()
        each = np.arange(len(rows))
        token, mean = step.arrays.path[each, n - begin], step.arrays.mean[each, n - 1 - begin]
        require_finite(token, "denoise_step")
        return token, mean

    def resume(
        self, rows: IntArray, guidance: FloatArray, start: FloatArray, noise: FloatArray, begin: IntArray
    ) -> tuple[Speculation, IntArray]:
        """Draft what is left of the chains of `rows [J]` by the target's own head on few steps, and judge it.

        Arguments as in `finish`. Up to where a row begins its path is its start and both means are 0. Returns the
        sequential head calls of each row `[J]`, too.
        """
        assert self.target is not None
        assert self._resume_step_mask is not None
        head = self.target.head
        most = head.capacity.paths_per_call(len(guidance), head.modulation_width, head.chain.length)
        parts = [slice(first, first + most) for first in range(0, len(rows), most)]
        done = [self._resume_part(rows[p], guidance[:, p], start[p], noise[p], begin[p]) for p in parts]
        path, mean, target_mean = (np.concatenate(arrays) for arrays in zip(*done, strict=True))
        after = self._resume_step_mask & (np.arange(noise.shape[1]) > begin[:, None])
        return Speculation(Trajectory(path, mean), Trajectory(path, target_mean)), 1 + after.sum(axis=1)

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

    # --- what the host fills ----------------------------------------------------------------------------

    def _launch_block(
        self,
        model: Model,
        drafting: bool,
        prepared: list[tuple[BackboneCall, IntArray]],
        rows: PaddedRows,
        positions: PositionBatch,
        tokens: FloatArray,
        normals: FloatArray,
        guidance: FloatArray,
    ) -> _Block:
        calls = tuple(call for call, _ in prepared)
        block = self._block(model, drafting, calls, tokens.shape[:2], rows.counts)
        block.token_buffer[:] = tokens
        block.arrays.normals[:], block.arrays.guidance[:] = normals[rows.source], guidance[:, rows.source]
        block.token_row[:] = (positions.image_index * tokens.shape[1] + positions.position)[rows.source]
        z_rows = np.concatenate([z_row for _, z_row in prepared], axis=1)[:, rows.source]
        for chains, part in zip(block.chains, row_slices(rows.counts), strict=True):
            chains.z_row[:] = z_rows[:, part].ravel()
        block.launch()
        return block

    def _resume_part(
        self, rows: IntArray, guidance: FloatArray, start: FloatArray, noise: FloatArray, begin: IntArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Path, draft's means and target's means of whole chains, for as many rows as one call judges."""
        last, (_, n, dim) = self._last(), noise.shape
        here = self._padded(rows, last)
        length = self.device.bucketed(n - int(begin.min()), n)
        step = self._resume(last.call, len(guidance), len(here), length)
        self._fill(step, last, rows[here], guidance[:, here], start[here], noise[here, n - length :])
        step.chains.begin_at(begin[here])
        step.launch()
        self.device.wait()
        path, mean = np.repeat(start[:, None], n + 1, axis=1), np.zeros((len(rows), n, dim), np.float32)
        target_mean = np.zeros_like(mean)
        left = (step.arrays.path, step.arrays.mean, step.target_mean)
        for whole, suffix in zip((path, mean, target_mean), left, strict=True):
            whole[:, n - length :] = suffix[: len(rows)]
        before = np.arange(n) < begin[:, None]
        mean[before], target_mean[before] = 0, 0
        require_finite(path[:, -1], "denoise_step")
        require_finite(target_mean, "path_means")
        return path, mean, target_mean

    def _last(self) -> _LastRound:
        assert self._last_round is not None
        return self._last_round

    def _padded(self, rows: IntArray, last: _LastRound) -> IntArray:
        """Indices of `rows [J]`, the last repeated up to the size that is recorded."""
        return np.minimum(np.arange(self.device.bucketed(len(rows), last.padded)), len(rows) - 1)

    @staticmethod
    def _fill(
        step: _Chains, last: _LastRound, rows: IntArray, guidance: FloatArray, start: FloatArray, noise: FloatArray
    ) -> None:
        step.arrays.guidance[:] = guidance
        step.arrays.normals[:, 0], step.arrays.normals[:, 1:] = start, noise
        step.chains.z_row[:] = last.z_rows[:, rows].ravel()

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
        device, head, rows = self.device, model.head, sum(counts)
        token_buffer = device.zeros((*shape, head.token_dim), np.float32)
        token_row = device.zeros((rows,), np.int64)
        arrays = ChainArrays.make(head, model.backbone.branches, rows, head.chain.length)
        chains: list[FullChains | StridedChains] = []
        work: list[BoundCall] = []
        for call, part in zip(calls, row_slices(counts), strict=True):
            buffers = self._buffers(head, model.backbone.branches, part.stop - part.start)
            if drafting and self._draft_step_mask is not None:
                own = self.draft is None  # then the target needs the rest of the modulation to judge
                drawn: FullChains | StridedChains = StridedChains(
                    head, buffers, call.z, arrays.pick(part), self._draft_step_mask, keep_left_out=own
                )
            else:
                drawn = FullChains(head, buffers, call.z, arrays.pick(part))
            stored = device.scatter(token_buffer.reshape(-1, head.token_dim), drawn.token, token_row[part])
            work += [*call.run(device, token_buffer), *drawn.calls, stored]
            chains.append(drawn)
        filled = [token_buffer, arrays.guidance, arrays.normals, token_row]
        filled += [array for call in calls for array in call.inputs] + [each.z_row for each in chains]
        launch = device.record([device.upload(*filled), *work, device.download(*arrays.drawn)])
        return _Block(token_buffer, arrays, chains, token_row, launch)

    def _record_verification(self, call: BackboneCall, block: _Block) -> _Verification:
        device, drafted = self.device, block.arrays
        assert self.target is not None
        head, (branches, rows) = self.target.head, drafted.guidance.shape
        # Where the target drafts for itself its backbone has been called already.
        asked = [] if self.draft is None else [device.upload(*call.inputs), *call.run(device, block.token_buffer)]
        if self._shared_noise:
            made = ChainArrays.make(head, branches, rows, head.chain.length)
            own = ChainArrays(drafted.guidance, drafted.normals, made.path, made.mean, made.std)
            chains = FullChains(head, self._buffers(head, branches, rows), call.z, own)
            work = [device.upload(chains.z_row), *chains.calls, device.download(*own.drawn)]
            return _Verification([(slice(0, rows), chains.z_row)], own, device.record([*asked, *work]))
        mean = device.zeros(drafted.mean.shape, np.float32)
        judged = ChainArrays(drafted.guidance, drafted.normals, drafted.path, mean, None)
        if self.draft is None and self._judges_own(block.chains[0], branches, rows):
            work = own_path_means(head, block.chains[0], drafted, mean)
            return _Verification([], judged, device.record([*asked, *work, device.download(mean)]))
        whole = PathMeans(head, call.z, drafted, mean)
        upload = device.upload(*(z_row for _, z_row in whole.parts))
        return _Verification(whole.parts, judged, device.record([*asked, upload, *whole.calls, device.download(mean)]))

    def _judges_own(self, chains: FullChains | StridedChains, branches: int, rows: int) -> bool:
        """Whether the steps that a head left out of its own draft can be judged at once, on the draft's modulation."""
        assert self.target is not None
        head = self.target.head
        fits = rows <= head.capacity.paths_per_call(branches, head.modulation_width, head.chain.length)
        return fits and (not len(chains.left_out) or chains.left_out_modulation is not None)

    def _record_finish(self, call: BackboneCall, branches: int, rows: int, length: int) -> _Chains:
        assert self.target is not None
        device, head = self.device, self.target.head
        arrays = ChainArrays.make(head, branches, rows, length)
        chains = FullChains(head, self._buffers(head, branches, rows), call.z, arrays, own_begin=True)
        upload = device.upload(arrays.guidance, arrays.normals, chains.z_row, *chains.inputs)
        launch = device.record([upload, *chains.calls, device.download(arrays.path, arrays.mean)])
        return _Chains(arrays, np.zeros(0, np.float32), chains, launch)

    def _record_resume(self, call: BackboneCall, branches: int, rows: int, length: int) -> _Chains:
        assert self.target is not None
        assert self._resume_step_mask is not None
        device, head = self.device, self.target.head
        arrays = ChainArrays.make(head, branches, rows, length)
        step_mask, buffers = self._resume_step_mask[-length:], self._buffers(head, branches, rows)
        chains = StridedChains(head, buffers, call.z, arrays, step_mask, own_begin=True)
        mean = device.zeros(arrays.mean.shape, np.float32)
        judged = own_path_means(head, chains, arrays, mean)
        upload = device.upload(arrays.guidance, arrays.normals, chains.z_row, *chains.inputs)
        download = device.download(arrays.path, arrays.mean, mean)
        return _Chains(arrays, mean, chains, device.record([upload, *chains.calls, *judged, download]))

    def _record_catch_up(self, call: BackboneCall, shape: tuple[int, ...]) -> tuple[Array, BoundCall]:
        device = self.device
        token_buffer = device.zeros(shape, np.float32)
        return token_buffer, device.record([device.upload(token_buffer, *call.inputs), *call.run(device, token_buffer)])


def _prepare_each(draft: Model, positions: PositionBatch) -> list[tuple[BackboneCall, IntArray]]:
    """A backbone call for each AR step, in buffers of its own, and the rows of its z."""
    return [draft.backbone.prepare(positions.at(offset), offset) for offset in range(positions.length)]


def _drawn(arrays: ChainArrays, rows: IntArray | slice) -> Trajectory:
    """Some rows of what a launch left."""
    path = arrays.path[rows]
    require_finite(path[:, -1], "denoise_step")
    return Trajectory(path, arrays.mean[rows], None if arrays.std is None else arrays.std[rows])
