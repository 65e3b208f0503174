"""The steps of decoding on static buffers: each is launched at once, with nothing for the host in between.

The target's step makes the tokens of one AR step. A round launches the draft block (γ times backbone and
chain, each fed with the tokens before it) and the verification; a rejection launches the completion, and before it
where much is left of the chain one or more redrafts. What is staged for a launch, and what it leaves, lies in arrays
that live as long as the step's shape is in use.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import BoundCall, Device
from specdec_rt.decode.chain import ChainRun, Head, Trajectory, require_finite
from specdec_rt.decode.draft import ChainNoise, Model, Proposal
from specdec_rt.decode.redraft import Redrafts, Round
from specdec_rt.decode.staging import Rows, Staged
from specdec_rt.families.backbone import Ask
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import Array, BoolArray, FloatArray, IntArray

__all__ = ["Steps"]


@dataclass(frozen=True, eq=False)
class _Single:
    """One AR step by one model."""

    staged: Staged
    z_row: Array
    run: ChainRun
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Draft:
    """A round's proposal."""

    staged: Staged
    z_rows: list[Array]
    """`[G R_o]` of each AR step: rows of its backbone call's z"""
    runs: list[ChainRun]
    path: Array
    """`[R', n + 1, D]`"""
    mean: Array
    """`[R', n, D]`"""
    std: Array | None
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Verify:
    """The target's means at all states of a proposal, or its own chains on the same noise."""

    z_rows: list[Array]
    """of parts whose modulation is still to be made"""
    rows: list[slice]
    """the padded rows that each of `z_rows` is for"""
    mean: Array
    """`[R', n, D]`; empty in `paper` mode"""
    modulation: Array | None
    """`[n, R', G, M]`, of all rows; None where they are judged part by part"""
    places: IntArray
    """`[n]` where each transition's lies in it"""
    run: ChainRun | None
    launch: BoundCall


@dataclass(frozen=True, eq=False)
class _Complete:
    z_row: Array
    run: ChainRun
    launch: BoundCall


class Steps:
    """The steps of one pair of models, their buffers and recordings.

    `evaluate [n]` as in `Head.run`, for the draft; `grid [n]` the same, for `redraft`.
    """

    def __init__(
        self,
        device: Device,
        *,
        target: Model | None,
        draft: Model | None,
        evaluate: BoolArray | None,
        aligned: bool,
        grid: BoolArray | None = None,
    ) -> None:
        self.target, self.draft = target, draft
        """target: None where the draft decodes alone; draft: None where no model drafts"""
        self.device = device
        self._evaluate = evaluate
        self._redrafts = None if target is None or grid is None else Redrafts(device, target.head, grid)
        self._aligned = aligned
        self._round: Round | None = None
        kept = lru_cache(maxsize=device.kept_shapes)
        self._single = kept(self._make_single)
        self._catching_up = kept(self._make_catch_up)
        self._drafting = kept(self._make_draft)
        self._verifying = kept(self._make_verify)
        self._completing = kept(self._make_complete)

    @property
    def models(self) -> list[Model]:
        """Those that there are."""
        return [model for model in (self.target, self.draft) if model is not None]

    def single(
        self, model: Model, tokens: FloatArray, span: PositionBatch, noise: ChainNoise, guidance: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Tokens and means `[R, D]` of the one AR step of a span, by `model` alone.

        `tokens [A, L, D]` what is committed, `guidance [G, R]`.
        """
        rows = Rows.of(span, self.device)
        ask, z_row = model.backbone.ask(span)
        step = self._single(model is self.draft, ask, len(tokens), tokens.shape[1], rows.counts[0])
        step.staged.fill(span, rows, tokens, noise, guidance)
        step.z_row.reshape(len(guidance), -1)[:] = z_row[:, rows.source]
        step.run.begin_at(None)
        step.launch()
        self.device.wait()
        chain = step.run.buffers
        token, mean = chain.path[-1][rows.where], chain.mean[-1][rows.where]
        require_finite(token, "denoise_step")
        return token, mean

    def round(
        self, tokens: FloatArray, span: PositionBatch, noise: ChainNoise, guidance: FloatArray
    ) -> tuple[Trajectory, FloatArray | Trajectory]:
        """What the draft proposes for the R rows of a span, and what the target has to say of it.

        That is its means `[R, n, D]` at the drafted states; where the step is *aligned*, its own chains on
        the draft's noise. Both are overwritten by the next round.
        """
        assert self.target is not None
        rows = Rows.of(span, self.device)
        target_ask, z_rows = self.target.backbone.ask(span)
        padded = z_rows[:, rows.source]
        # Where the target's own head drafts, a round is one AR step.
        asked = [(target_ask, padded)] if self.draft is None else self._ask_draft(self.draft, span, rows)
        draft = self._drafting(tuple(ask for ask, _ in asked), len(tokens), tokens.shape[1], rows.counts)
        verify = self._verifying(target_ask, draft, len(guidance))
        draft.staged.fill(span, rows, tokens, noise, guidance)
        for z_row, (_, wanted) in zip(draft.z_rows, asked, strict=True):
            z_row[:] = wanted.ravel()
        for z_row, part in zip(verify.z_rows, verify.rows, strict=True):
            z_row[:] = padded[:, part].ravel()
        for run in [*draft.runs, *([] if verify.run is None else [verify.run])]:
            run.begin_at(None)
        draft.launch()
        verify.launch()
        self.device.wait()
        padded_rows = np.arange(len(draft.path))
        where = padded_rows[rows.where]
        self._round = Round(target_ask, z_rows, len(padded_rows), where, verify.modulation, verify.places)
        return self._proposed(draft, rows), self._verified(verify, rows)

    def complete(
        self, rows: IntArray, guidance: FloatArray, start: FloatArray, noise: FloatArray, begin: IntArray
    ) -> tuple[FloatArray, FloatArray]:
        """The target's chains for K `rows` of the last round's span, from `start [K, D]` before transition `begin [K]`.

        `guidance [G, K]`, `noise [K, n, D]` by transition. Returns tokens and means `[K, D]`.
        """
        assert self.target is not None
        assert self._round is not None
        ask, z_rows = self._round.ask, self._round.z_rows
        n = self.target.head.chain.length
        count = self.device.bucketed(len(rows), self._round.padded)
        here = np.minimum(np.arange(count), len(rows) - 1)
        length = self.device.bucketed(n - int(begin.min()), n)
        step = self._completing(ask, len(guidance), count, length)
        chain = step.run.buffers
        step.z_row.reshape(len(guidance), -1)[:] = z_rows[:, rows[here]]
        chain.guidance[:], chain.path[0] = guidance[:, here], start[here]
        step.run.begin_at(begin[here])
        chain.noise[:] = noise[here[:, None], chain.step.T].swapaxes(0, 1)
        step.launch()
        self.device.wait()
        each = np.arange(len(rows))
        token, mean = chain.path[n - begin, each], chain.mean[n - 1 - begin, each]
        require_finite(token, "denoise_step")
        return token, mean

    def redraft(
        self, rows: IntArray, guidance: FloatArray, start: FloatArray, noise: FloatArray, begin: IntArray
    ) -> tuple[Proposal, FloatArray, IntArray]:
        """As `Redrafts`, of the last round; before any `complete` of it, for it may use the round's modulation."""
        assert self._redrafts is not None
        assert self._round is not None
        return self._redrafts(self._round, rows, guidance, start, noise, begin)

    def catch_up(self, order: IntArray, known: IntArray, tokens: FloatArray, steps: int) -> int:
        """Let the draft take in `tokens [A, L, D]` of the first AR steps; returns its backbone calls per image."""
        assert self.draft is not None
        ask = self.draft.backbone.catch_up(order, known, steps)
        if ask is None:
            return 0
        canvas, launch = self._catching_up(ask, tokens.shape)
        canvas[:] = tokens
        launch()
        self.device.wait()
        return 1

    # --- what is recorded -----------------------------------------------------------------------------

    def _ask_draft(self, draft: Model, span: PositionBatch, rows: Rows) -> list[tuple[Ask, IntArray]]:
        """A backbone call for each AR step, and the padded rows of its z."""
        asked = []
        first = 0
        source = np.arange(len(span.owner))[rows.source]
        for offset, part in enumerate(rows.slices):
            ask, z_row = draft.backbone.ask(span.at(offset), offset)
            asked.append((ask, z_row[:, source[part] - first]))
            first += z_row.shape[1]
        return asked

    def _staged(self, head: Head, images: int, tokens: int, rows: int, branches: int) -> Staged:
        zeros, dim = self.device.zeros, head.token_dim
        return Staged(
            canvas=zeros((images, tokens, dim), np.float32),
            normals=zeros((rows, head.chain.length + 1, dim), np.float32),
            guidance=zeros((branches, rows), np.float32),
            place=zeros((rows,), np.int64),
        )

    def _sampling(
        self,
        model: Model,
        z: Array,
        staged: Staged,
        rows: slice,
        evaluate: BoolArray | None,
        *,
        whole: bool = False,
    ) -> tuple[Array, ChainRun, list[BoundCall]]:
        """The chains of some staged rows on conditions gathered from `z [M, Z]`; which of them is staged, too."""
        device, head, branches = self.device, model.head, len(staged.guidance)
        chain = head.buffers(branches, rows.stop - rows.start)
        run = head.run(chain, evaluate, whole=whole)
        z_row = device.zeros((chain.guidance.size,), np.int64)
        normals = staged.normals[rows].swapaxes(0, 1)
        return (
            z_row,
            run,
            [
                device.gather(chain.z.reshape(len(z_row), -1), z, z_row),
                device.copy(chain.guidance, staged.guidance[:, rows]),
                device.copy(chain.path[0], normals[0]),
                device.copy(chain.noise, normals[1:]),
                *run.calls,
            ],
        )

    def _make_single(self, drafting: bool, ask: Ask, images: int, tokens: int, count: int) -> _Single:
        model = self.draft if drafting else self.target
        assert model is not None
        device = self.device
        staged = self._staged(model.head, images, tokens, count, model.backbone.branches)
        evaluate = self._evaluate if drafting else None
        z_row, run, calls = self._sampling(model, ask.z, staged, slice(0, count), evaluate)
        launch = device.record(
            [
                device.upload(*staged.arrays, *ask.inputs, z_row, *run.inputs),
                *ask.run(device, staged.canvas),
                *calls,
                device.download(run.buffers.path[-1], run.buffers.mean[-1]),
            ]
        )
        return _Single(staged, z_row, run, launch)

    def _make_catch_up(self, ask: Ask, shape: tuple[int, ...]) -> tuple[Array, BoundCall]:
        device = self.device
        canvas = device.zeros(shape, np.float32)
        return canvas, device.record([device.upload(canvas, *ask.inputs), *ask.run(device, canvas)])

    def _make_draft(self, asks: tuple[Ask, ...], images: int, tokens: int, counts: tuple[int, ...]) -> _Draft:
        device, model = self.device, self.draft or self.target
        assert model is not None
        n, dim, total = model.head.chain.length, model.head.token_dim, sum(counts)
        staged = self._staged(model.head, images, tokens, total, model.backbone.branches)
        path, mean = device.zeros((total, n + 1, dim), np.float32), device.zeros((total, n, dim), np.float32)
        std = device.zeros(mean.shape, np.float32) if model.head.learned else None
        canvas = staged.canvas.reshape(-1, dim)
        calls: list[BoundCall] = []
        z_rows, runs = [], []
        for ask, rows in zip(asks, Rows(counts, slice(None), slice(None)).slices, strict=True):
            # Modulation of transitions that the target's own head leaves out is wanted when it judges its draft.
            whole = self.draft is None and not self._aligned
            z_row, run, sampling = self._sampling(model, ask.z, staged, rows, self._evaluate, whole=whole)
            chain = run.buffers
            calls += [*ask.run(device, staged.canvas), *sampling]
            kept = (path, mean) if std is None else (path, mean, std)
            calls += [device.copy(to[rows], of.swapaxes(0, 1)) for to, of in zip(kept, chain.drawn, strict=True)]
            calls.append(device.scatter(canvas, chain.path[-1], staged.place[rows]))
            z_rows.append(z_row)
            runs.append(run)
        inputs = [array for ask in asks for array in ask.inputs] + [array for run in runs for array in run.inputs]
        launch = device.record(
            [
                device.upload(*staged.arrays, *inputs, *z_rows),
                *calls,
                device.download(path, mean, *([] if std is None else [std])),
            ]
        )
        return _Draft(staged, z_rows, runs, path, mean, std, launch)

    def _make_verify(self, ask: Ask, draft: _Draft, branches: int) -> _Verify:
        device, target, staged = self.device, self.target, draft.staged
        assert target is not None
        # Where the target's own head drafts, its backbone has been called already.
        asking = [] if self.draft is None else [device.upload(*ask.inputs), *ask.run(device, staged.canvas)]
        in_order = np.arange(target.head.chain.length)
        if self._aligned:
            rows = slice(0, len(draft.path))
            z_row, run, calls = self._sampling(target, ask.z, staged, rows, None)
            moved = device.upload(z_row, *run.inputs), *calls, device.download(*run.buffers.drawn)
            return _Verify([z_row], [rows], np.zeros(0), None, in_order, run, device.record([*asking, *moved]))
        mean = device.zeros(draft.mean.shape, np.float32)
        own = draft.runs[0] if self.draft is None else None
        if own is not None and own.places is not None and len(draft.path) <= target.head.paths_per_call(branches):
            launch = device.record([*asking, *self._judge_own(draft, own, mean), device.download(mean)])
            return _Verify([], [], mean, own.buffers.modulation, own.places, None, launch)
        z_rows, z_parts, judging = [], [], []
        parts = target.head.density(branches, draft.path, mean)
        for part in parts:
            assert part.z is not None
            z_row = device.zeros((part.guidance.size,), np.int64)
            judging.append(device.gather(part.z.reshape(len(z_row), -1), ask.z, z_row))
            z_rows.append(z_row)
            z_parts.append(part.rows)
            judging += [device.copy(part.guidance, staged.guidance[:, part.rows]), *part.calls]
        launch = device.record([*asking, device.upload(*z_rows), *judging, device.download(mean)])
        modulation = parts[0].modulation if len(parts) == 1 else None
        return _Verify(z_rows, z_parts, mean, modulation, in_order, None, launch)

    def _judge_own(self, draft: _Draft, run: ChainRun, mean: Array) -> list[BoundCall]:
        """What fills the target's means `mean [R', n, D]` of paths that its own head drafted.

        Where it was evaluated to draft them, its means are the draft's. The other transitions are evaluated at once.
        """
        assert self.target is not None
        device, head, (rows, n, dim) = self.device, self.target.head, mean.shape
        calls = [device.copy(mean, draft.mean)]
        others = np.flatnonzero(~self._evaluate) if self._evaluate is not None else np.arange(0)
        if not len(others):
            return calls
        states = device.zeros((rows, len(others) + 1, dim), np.float32)
        found = device.zeros((rows, len(others), dim), np.float32)
        of_path, of_mean = (device.zeros(array.shape[:2], np.int64) for array in (states, found))
        first = np.arange(rows)[:, None]
        of_path[:] = first * (n + 1) + np.append(others, n)
        of_mean[:] = first * n + others
        device.upload(of_path, of_mean)()
        calls.append(device.gather(states.reshape(-1, dim), draft.path.reshape(-1, dim), of_path.ravel()))
        modulation = run.buffers.modulation[n - len(others) :]
        (part,) = head.density(len(draft.staged.guidance), states, found, modulation, others)
        calls += [device.copy(part.guidance, draft.staged.guidance), *part.calls]
        calls.append(device.scatter(mean.reshape(-1, dim), found.reshape(-1, dim), of_mean.ravel()))
        return calls

    def _make_complete(self, ask: Ask, branches: int, count: int, length: int) -> _Complete:
        device, target = self.device, self.target
        assert target is not None
        chain = target.head.buffers(branches, count)
        run = target.head.run(chain, None, length)
        z_row = device.zeros((branches * count,), np.int64)
        launch = device.record(
            [
                device.upload(z_row, chain.guidance, *run.inputs, chain.path[0], chain.noise),
                device.gather(chain.z.reshape(len(z_row), -1), ask.z, z_row),
                *run.calls,
                device.download(chain.path, chain.mean),
            ]
        )
        return _Complete(z_row, run, launch)

    # --- what is read -----------------------------------------------------------------------------------

    @staticmethod
    def _proposed(draft: _Draft, rows: Rows) -> Trajectory:
        path = draft.path[rows.where]
        require_finite(path[:, -1], "denoise_step")
        return Trajectory(path, draft.mean[rows.where], None if draft.std is None else draft.std[rows.where])

    @staticmethod
    def _verified(verify: _Verify, rows: Rows) -> FloatArray | Trajectory:
        if verify.run is None:
            mean = verify.mean[rows.where]
            require_finite(mean, "path_means")
            return mean
        path, mean, *std = (array.swapaxes(0, 1)[rows.where] for array in verify.run.buffers.drawn)
        require_finite(path[:, -1], "denoise_step")
        return Trajectory(path, mean, std[0] if std else None)
