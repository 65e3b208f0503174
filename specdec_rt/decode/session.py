"""The launches of decoding: what a pair of models does without the host in between, recorded on static buffers.

A round is two launches: the draft block (γ times backbone and chains, each fed with the tokens before it), and the
verification. Where tokens are rejected, others follow: one finishes their chains step by step, or one drafts and judges
what is left of them. On a GPU each launch is a captured CUDA graph. The host fills static arrays before a launch, and
reads others after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import BoundCall, Device
from specdec_rt.decode.chain_plan import CallBuffers, ChainArrays, FullChains, StridedChains
from specdec_rt.decode.head import Trajectory, require_finite
from specdec_rt.decode.model import Model
from specdec_rt.decode.path_means import evaluate_left_out, evaluate_paths
from specdec_rt.decode.round import ChainSuffixes, RowInputs, Speculation
from specdec_rt.families.backbone import BackboneCall
from specdec_rt.families.padded_rows import PaddedRows, row_slices
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["Session"]

Prepared = tuple[BackboneCall, IntArray]
"""a filled call, and which rows of its z belong to the rows that it was filled for"""
Chains = FullChains | StridedChains
Calls = tuple[BackboneCall, ...]
Sizes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Block:
    """AR steps of one model, one after the other."""

    token_buffer: Array
    """`[A, L, D]`"""
    token_row: Array
    """`[R]` the row of the token buffer that each drawn token goes to"""
    arrays: ChainArrays
    chains: list[Chains]
    """of each AR step"""
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Verification:
    """What the target says of a block."""

    z_rows: Sequence[tuple[slice, Array]]
    """some rows, and `[G · rows]`: which rows of the backbone's z are their conditions"""
    target: ChainArrays
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Suffixes:
    """Chains that are finished; or what is left of them, drafted, and what the target says of that."""

    drawn: ChainArrays
    target: ChainArrays
    chains: Chains
    launch: BoundCall


@dataclass(eq=False, kw_only=True)
class Session:
    """A target and a draft with their buffers, for one batch at a time."""

    device: Device
    target: Model | None
    """None where the draft decodes alone"""
    draft: Model | None
    """None where the target's own head drafts, or nothing does"""
    draft_step_mask: BoolArray | None = None
    """`[n]` the steps at which a draft calls its head; None: all"""
    resume_step_mask: BoolArray | None = None
    """`[n]` the steps at which the target calls its own head to draft what is left of a chain"""
    shared_noise: bool = False
    """whether the target is asked for chains of its own on the draft's noise (`paper` mode), instead of its means along
    the draft's paths"""

    def __post_init__(self) -> None:
        self._last_round: tuple[BackboneCall, IntArray, int]
        """the target's backbone call, the rows `[G, R]` of its z, and how many rows were padded to"""
        kept = lru_cache(maxsize=self.device.kept_shapes)
        self._buffers = kept(CallBuffers)
        self._block = kept(self._record_block)
        self._verification = kept(self._record_verification)
        self._suffixes = kept(self._record_suffixes)

    @property
    def models(self) -> list[Model]:
        """Those that there are, the one whose distribution counts first."""
        return [model for model in (self.target, self.draft) if model is not None]

    @property
    def primary_model(self) -> Model:
        """The model whose distribution counts: the target, or the draft where that decodes alone."""
        return self.models[0]

    # --- launches ---------------------------------------------------------------------------------------

    def draw(self, model: Model, inputs: RowInputs) -> Trajectory:
        """The next AR step of each image by `model` alone."""
        positions, shape = inputs.positions, inputs.tokens.shape[:2]
        rows, prepared = PaddedRows.of(positions, self.device), [model.backbone.prepare(positions)]
        block = self._block(model, model is self.draft, (prepared[0][0],), shape, rows.counts)
        _fill_block(block, prepared, rows, inputs)
        block.launch()
        self.device.wait()
        drawn = _drawn(block.arrays, rows.where)
        require_finite(drawn.token, "denoise_step")
        return drawn

    def speculate(self, inputs: RowInputs) -> Speculation:
        """Draft the tokens of some AR steps of each image, and let the target judge them."""
        assert self.target is not None
        positions, shape = inputs.positions, inputs.tokens.shape[:2]
        rows, (call, z_rows) = PaddedRows.of(positions, self.device), self.target.backbone.prepare(positions)
        prepared = [(call, z_rows)]
        if self.draft is not None:  # a call for each AR step, in buffers of its own
            steps = range(positions.length)
            prepared = [self.draft.backbone.prepare(positions.at(step), copy=step) for step in steps]
        calls = tuple(each for each, _ in prepared)
        block = self._block(self.draft or self.target, True, calls, shape, rows.counts)
        verification = self._verification(call, block)
        _fill_block(block, prepared, rows, inputs)
        for part, z_row in verification.z_rows:
            z_row[:] = z_rows[:, rows.source][:, part].ravel()
        block.launch()
        verification.launch()
        self.device.wait()
        self._last_round = call, z_rows, sum(rows.counts)
        drawn, target = (_drawn(arrays, rows.where) for arrays in (block.arrays, verification.target))
        require_finite(drawn.token, "denoise_step")
        require_finite(target.mean, "denoise_step" if self.shared_noise else "path_means")
        return Speculation(drawn, target)

    def finish(self, left: ChainSuffixes) -> tuple[FloatArray, FloatArray]:
        """Tokens and their means `[J, D]`: the target's chains to their ends, step by step.

        The suffixes are of the last `speculate`.
        """
        n, each = left.noise.shape[1], np.arange(len(left.rows))
        done = self._launch_suffixes(left, resumed=False).drawn
        token, mean = done.path[each, n - left.begin], done.mean[each, n - 1 - left.begin]
        require_finite(token, "denoise_step")
        return token, mean

    def resume(self, left: ChainSuffixes) -> tuple[Speculation, IntArray]:
        """Draft the suffixes by the target's own head on few steps, and evaluate its means along the drafts.

        The suffixes are of the last `speculate`. Up to where a row begins its path is its start, and both means are 0.
        Returns the sequential head calls of each row `[J]`, too.
        """
        assert self.resume_step_mask is not None
        _, n, dim = left.noise.shape
        path = np.repeat(left.start[:, None], n + 1, axis=1)
        mean, target_mean = (np.zeros((len(path), n, dim), np.float32) for _ in range(2))
        most = self.primary_model.head.paths_per_call(len(left.guidance))
        for first in range(0, len(path), most):
            part = slice(first, first + most)
            made, rows = self._launch_suffixes(left.pick(part), resumed=True), len(path[part])
            for whole, suffix in ((path, made.drawn.path), (mean, made.drawn.mean), (target_mean, made.target.mean)):
                whole[part, len(whole[0]) - len(suffix[0]) :] = suffix[:rows]
        before = np.arange(n) < left.begin[:, None]
        mean[before], target_mean[before] = 0, 0
        require_finite(path[:, -1], "denoise_step")
        require_finite(target_mean, "path_means")
        calls = 1 + (self.resume_step_mask & (np.arange(n) > left.begin[:, None])).sum(axis=1)
        return Speculation(Trajectory(path, mean), Trajectory(path, target_mean), left.begin), calls

    def _launch_suffixes(self, left: ChainSuffixes, *, resumed: bool) -> _Suffixes:
        """Finish the chains, or draft what is left of them and evaluate that. Padding repeats the last row."""
        (call, z_rows, padded), count, n = self._last_round, len(left.rows), left.noise.shape[1]
        branches = len(left.guidance)
        most = min(padded, self.primary_model.head.paths_per_call(branches)) if resumed else padded
        left = left.pick(np.minimum(np.arange(self.device.bucketed(count, most)), count - 1))
        length = self.device.bucketed(n - int(left.begin.min()), n)
        # Finished chains are aligned at their beginnings, resumed ones at their ends.
        first = np.full_like(left.begin, n - length) if resumed else left.begin
        transition = np.minimum(first[:, None] + np.arange(length), n - 1)
        launch = self._suffixes(call, branches, len(left.rows), length, resumed)
        launch.drawn.guidance[:], launch.drawn.normals[:, 0] = left.guidance, left.start
        launch.drawn.normals[:, 1:] = np.take_along_axis(left.noise, transition[..., None], axis=1)
        launch.chains.z_row[:] = z_rows[:, left.rows].ravel()
        launch.chains.begin_at(left.begin)
        launch.launch()
        self.device.wait()
        return launch

    # --- what is recorded -------------------------------------------------------------------------------

    def _record_block(self, model: Model, drafting: bool, calls: Calls, images: Sizes, rows: Sizes) -> _Block:
        """AR steps of one model: `images` is (A, L), `rows` are those of each step."""
        device, head, branches = self.device, model.head, model.backbone.branches
        token_buffer = device.zeros((*images, head.token_dim), np.float32)
        token_row = device.zeros((sum(rows),), np.int64)
        arrays = ChainArrays.make(head, branches, sum(rows), head.chain.length)
        mask = self.draft_step_mask if drafting else None
        chains: list[Chains] = []
        work = []
        for call, part in zip(calls, row_slices(rows), strict=True):
            given = head, self._buffers(head, branches, part.stop - part.start), call.z, arrays.pick(part)
            if mask is None or mask.all():
                chains.append(FullChains(*given))
            else:  # a target that drafts for itself judges what it leaves out on modulation that it makes with the rest
                chains.append(StridedChains(*given, mask, keep_left_out=self.draft is None))
            stored = device.scatter(token_buffer.reshape(-1, head.token_dim), chains[-1].token, token_row[part])
            work += [*call.run(device, token_buffer), *chains[-1].calls, stored]
        filled = [token_buffer, arrays.guidance, arrays.normals, token_row]
        filled += [array for call in calls for array in call.inputs] + [each.z_row for each in chains]
        launch = device.record([device.upload(*filled), *work, device.download(*arrays.drawn)])
        return _Block(token_buffer, token_row, arrays, chains, launch)

    def _record_verification(self, call: BackboneCall, block: _Block) -> _Verification:
        device, head, drawn = self.device, self.primary_model.head, block.arrays
        branches, rows = drawn.guidance.shape
        # Where the target drafts for itself its backbone has been called already.
        asked = [] if self.draft is None else [device.upload(*call.inputs), *call.run(device, block.token_buffer)]
        z_rows: list[tuple[slice, Array]] = []
        if self.shared_noise:
            made = ChainArrays.make(head, branches, rows, head.chain.length)
            target = replace(made, guidance=drawn.guidance, normals=drawn.normals)
            chains = FullChains(head, self._buffers(head, branches, rows), call.z, target)
            z_rows, work = [(slice(None), chains.z_row)], [*chains.calls, device.download(*target.drawn)]
        else:
            target = replace(drawn, mean=device.zeros(drawn.mean.shape, np.float32), std=None)
            fits = rows <= head.paths_per_call(branches) and block.chains[0].left_out_modulation is not None
            if self.draft is None and fits:
                evaluated = evaluate_left_out(head, block.chains[0], drawn, target.mean)
            else:
                z_rows, evaluated = evaluate_paths(head, call.z, target)
            work = [*evaluated, device.download(target.mean)]
        upload = device.upload(*(z_row for _, z_row in z_rows))
        return _Verification(z_rows, target, device.record([*asked, upload, *work]))

    def _record_suffixes(self, call: BackboneCall, branches: int, rows: int, length: int, resumed: bool) -> _Suffixes:
        device, head = self.device, self.primary_model.head
        drawn = target = ChainArrays.make(head, branches, rows, length)
        given = head, self._buffers(head, branches, rows), call.z, drawn
        if resumed:
            assert self.resume_step_mask is not None
            chains: Chains = StridedChains(*given, self.resume_step_mask[-length:], own_begin=True)
            target = replace(drawn, mean=device.zeros(drawn.mean.shape, np.float32))
            evaluated = [*evaluate_left_out(head, chains, drawn, target.mean), device.download(target.mean)]
        else:
            chains, evaluated = FullChains(*given, own_begin=True), []
        upload = device.upload(drawn.guidance, drawn.normals, chains.z_row, *chains.inputs)
        launch = device.record([upload, *chains.calls, *evaluated, device.download(*drawn.drawn)])
        return _Suffixes(drawn, target, chains, launch)


def _fill_block(block: _Block, prepared: list[Prepared], rows: PaddedRows, inputs: RowInputs) -> None:
    """Fill what the host gives to a block."""
    positions, source = inputs.positions, rows.source
    block.token_buffer[:] = inputs.tokens
    block.arrays.normals[:], block.arrays.guidance[:] = inputs.normals[source], inputs.guidance[:, source]
    block.token_row[:] = (positions.image_index * inputs.tokens.shape[1] + positions.position)[source]
    z_rows = np.concatenate([z_row for _, z_row in prepared], axis=1)[:, source]
    for chains, part in zip(block.chains, row_slices(rows.counts), strict=True):
        chains.z_row[:] = z_rows[:, part].ravel()


def _drawn(arrays: ChainArrays, rows: IntArray | slice) -> Trajectory:
    """Some rows of what a launch left."""
    return Trajectory(arrays.path[rows], arrays.mean[rows], None if arrays.std is None else arrays.std[rows])
