"""`load(bundle).generate(...)`: what a program that embeds the runtime calls."""

import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from specdec_rt.backend_choice import open_backend
from specdec_rt.backends.base import Backend, Engine, run_once
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import read_recipe
from specdec_rt.bundle import Bundle, load_bundle
from specdec_rt.chain import Chain, ChainSpec, compile_chain
from specdec_rt.config import DecodeOptions, Mode, check_whole_number
from specdec_rt.decode.chain import Head
from specdec_rt.decode.draft import Model
from specdec_rt.decode.loop import Decoder, Session
from specdec_rt.decode.pace import Pace
from specdec_rt.decode.plan import make_plan
from specdec_rt.decode.stats import Counters, Stats
from specdec_rt.decode.steps import Steps
from specdec_rt.errors import BundleError, UsageError
from specdec_rt.families.backbone import Backbone
from specdec_rt.families.causal import CausalBackbone
from specdec_rt.families.mar import MarBackbone
from specdec_rt.manifest import Graph, GraphName
from specdec_rt.manifest import Model as ModelRecord
from specdec_rt.noise import NoiseSource
from specdec_rt.pixels import decode_pixels, lay_patches, to_bytes
from specdec_rt.types import Array, FloatArray, IntArray
from specdec_rt.workers import run_workers

__all__ = ["Pipeline", "Result", "load"]

DEFAULT_BATCH_SIZE = 16
KEPT_CHAINS = 8
"""Chains (a request's temperature makes a new one), and what is built on them, kept for the next request."""

Progress = Callable[[int, int], None]
"""`(tokens committed, tokens in all)`."""


@dataclass(frozen=True)
class Result:
    """What a request made."""

    images: Array | None
    """uint8 `[N, H, W, C]`; None where the bundle makes tokens only"""
    tokens: FloatArray
    """float32 `[N, L, D]`"""
    labels: IntArray
    """`[N]`"""
    stats: Stats


def load(
    bundle: str | Path = "digits",
    *,
    backend: str = "auto",
    recipe: str | Path | None = None,
    cache: str | Path | None = None,
    threads: int | None = None,
    workers: int = 1,
    cuda_graph: bool = True,
) -> "Pipeline":
    """Check a bundle (a folder, or an embedded one's name) and make it ready to generate.

    `recipe` is the TOML file that engines are built by, `cache` the folder they are kept in; `threads` bounds
    the cores that engines use, `cuda_graph=False` captures nothing. On a CPU `workers` share the images of a
    request and the cores: each has engines and buffers of its own, and so many cores that none is shared. Raises
    BundleError, BackendError, RecipeError or UsageError.
    """
    if threads is not None:
        check_whole_number("threads", threads, 1, os.cpu_count())  # more would only fight over the cores
    check_whole_number("workers", workers, 1, threads or os.cpu_count())
    checked = load_bundle(bundle)
    if workers > 1:
        threads = (threads or os.cpu_count() or 1) // workers

    def opened() -> Backend:
        return open_backend(
            checked,
            backend,
            recipe=None if recipe is None else read_recipe(Path(recipe)),
            cache=None if cache is None else EngineCache(Path(cache)),
            threads=threads,
            cuda_graph=cuda_graph,
        )

    return Pipeline(checked, opened(), [Pipeline(checked, opened()) for _ in range(workers - 1)])


class Pipeline:
    """A bundle on a backend. Engines are made when a request first needs them, then kept.

    Calls from several threads take turns: they share engines and buffers.
    """

    def __init__(self, bundle: Bundle, backend: Backend, others: Sequence["Pipeline"] = ()) -> None:
        self.bundle = bundle
        self.backend = backend
        self._workers = [self, *others]
        """those that the images of a request are shared out to"""
        self._engines: dict[str, Engine] = {}
        self._compiled = lru_cache(maxsize=KEPT_CHAINS)(compile_chain)
        self._head = lru_cache(maxsize=KEPT_CHAINS)(self._make_head)
        self._backbone = lru_cache(maxsize=KEPT_CHAINS)(self._make_backbone)
        self._steps = lru_cache(maxsize=KEPT_CHAINS)(self._make_steps)
        self._paces: dict[tuple[object, ...], Pace] = {}
        self._turn = threading.RLock()
        self._busy = False

    def generate(
        self,
        labels: Sequence[int] | IntArray,
        *,
        seed: int = 1,
        options: DecodeOptions | None = None,
        batch_size: int | None = None,
        indices: Sequence[int] | IntArray | None = None,
        progress: Progress | None = None,
        **overrides: object,
    ) -> Result:
        """Make one image for each of `labels [N]`.

        Image i draws its noise under key `indices[i]` (default i): the same seed and key give the same
        image whatever the batch (but for `draft_length="auto"`, see there). As an image is done, the next takes
        its place in the batch. Options are those of `DecodeOptions`, as a whole or by name. Raises UsageError
        (ChainError where the bundle's chain cannot do what the mode needs).
        """
        if options is not None and overrides:
            raise UsageError(f"both options and {sorted(overrides)} were given; pass one or the other")
        options = make_options(**overrides) if options is None else options
        if not isinstance(options, DecodeOptions):
            raise UsageError(f"options is {options!r}; expected DecodeOptions")
        labels = self._whole_numbers("labels", labels, self.bundle.manifest.classes)
        keys = np.arange(len(labels)) if indices is None else self._whole_numbers("indices", indices, 2**63 - 1)
        if len(keys) != len(labels):
            raise UsageError(f"{len(keys)} indices were given for {len(labels)} labels; expected one for each")
        most = self.backend.limits.batch_size
        size = min(DEFAULT_BATCH_SIZE, most or DEFAULT_BATCH_SIZE) if batch_size is None else batch_size
        check_whole_number("batch_size", size, 1)
        if most is not None and size > most:
            raise UsageError(
                f"batch_size is {size}, but the engines of backend {self.backend.name!r} are built for {most} at most: "
                "take a recipe with larger batch_buckets"
            )
        NoiseSource(seed)  # refuses a bad one
        tokens_each = self.bundle.manifest.tokens
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, len(labels) * tokens_each)

        with self._request():
            # Engines that are still missing are made before the clock runs, and before work that they might waste.
            count = min(len(self._workers), size, len(labels))
            sessions = [worker.session(options) for worker in self._workers[:count]]
            if self.bundle.manifest.decoder is not None:
                self._graph_engine(self.bundle.manifest.decoder.graph)
            counters = Counters()
            parts, lanes = (np.array_split(np.arange(whole), count) for whole in (len(labels), size))
            tasks = [
                partial(_decode, session, seed, labels[part], keys[part], len(places))
                for session, part, places in zip(sessions, parts, lanes, strict=True)
            ]
            started = time.perf_counter()
            made = [tasks[0](tell)] if count == 1 else run_workers(tasks, tell)
            tokens: FloatArray = np.concatenate([part for part, _ in made])
            images = self.draw(tokens)
            seconds = time.perf_counter() - started
        for _, counted in made:
            counters.add(counted)
        mode = sessions[0].plan.mode
        stats = Stats.of(counters, mode=mode, backend=self.backend.name, images=len(labels), seconds=seconds)
        return Result(images, tokens, labels, stats)

    def draw(self, tokens: FloatArray) -> Array | None:
        """Tokens `[N, L, D]` as images uint8 `[N, H, W, C]`; None where the bundle makes tokens only."""
        manifest = self.bundle.manifest
        if manifest.image is None:
            return None
        if manifest.decoder is None:
            return to_bytes(lay_patches(tokens, manifest.image, manifest.family))
        with self._own_turn():
            decoder = self._graph_engine(manifest.decoder.graph)
            return to_bytes(decode_pixels(tokens, manifest.image, self.backend.device, decoder))

    def session(self, options: DecodeOptions) -> Session:
        """The models that a request needs, and how they decode. Raises as `generate` does.

        Sessions share models and buffers: one batch at a time.
        """
        chain = self._chain(options)
        plan = make_plan(options, self.bundle.manifest, chain, self.backend.limits, self.backend.name)
        evaluate, grid = (None if steps is None else tuple(steps.tolist()) for steps in (plan.evaluate, plan.grid))
        branches = 1 if plan.guidance == 1 else 2
        with self._own_turn():
            slots = plan.slots if self.bundle.manifest.target.cache else 0  # else every γ would have steps of its own
            steps = self._steps(plan.mode, plan.draft, chain.spec, branches, slots, evaluate, grid)
            pace = None
            if plan.paced:
                # What changes the cost of rounds. The bundle has one chain, which a temperature makes no longer.
                key = (plan.draft, evaluate, branches, plan.schedule.steps)
                new = Pace(plan.schedule.known, plan.draft_length, uneven=plan.random_order)
                pace = self._paces.setdefault(key, new)
            return Session(plan, steps, pace)

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Buffers and device are this thread's alone."""
        with self._turn:
            self.backend.device.activate()
            yield

    @contextmanager
    def _request(self) -> Iterator[None]:
        """The turn of a request. Raises UsageError within another one's: it would write into that one's buffers."""
        with self._own_turn():
            if self._busy:
                raise UsageError(
                    "generate was called by the progress of another request on the same pipeline, whose buffers it "
                    "shares; call it when that request has returned, or load a second pipeline"
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _chain(self, options: DecodeOptions) -> Chain:
        spec = self.bundle.manifest.chain
        return self._compiled(replace(spec, temperature=spec.temperature * options.temperature))

    def _make_steps(
        self,
        mode: Mode,
        draft: str | None,
        spec: ChainSpec,
        branches: int,
        slots: int,
        evaluate: tuple[bool, ...] | None,
        grid: tuple[bool, ...] | None,
    ) -> Steps:
        return Steps(
            self.backend.device,
            target=None if mode == "draft" else self._model(None, spec, branches, slots),
            draft=None if draft is None else self._model(draft, spec, branches, slots),
            evaluate=None if evaluate is None else np.array(evaluate),
            aligned=mode == "paper",
            grid=None if grid is None else np.array(grid),
        )

    def _model(self, name: str | None, spec: ChainSpec, branches: int, slots: int) -> Model:
        """The target (None) or a draft."""
        record = self.bundle.manifest.model(name)
        head = self._head(name if record.head == "own" else None, spec)
        return Model(self._backbone(name, branches, slots), head)

    def _make_backbone(self, name: str | None, branches: int, slots: int) -> Backbone:
        manifest, device = self.bundle.manifest, self.backend.device
        record, null_label = manifest.model(name), manifest.classes
        engine = self.engine(record, GraphName.BACKBONE)
        sizes = {"tokens": manifest.tokens, "token_dim": manifest.token_dim, "branches": branches}
        if record.cache is None:
            return MarBackbone(device, engine, record.z_dim, null_label, **sizes)
        return CausalBackbone(device, engine, record.cache, record.z_dim, null_label, slots=slots, **sizes)

    def _make_head(self, name: str | None, spec: ChainSpec) -> Head:
        record, chain = self.bundle.manifest.model(name), self._compiled(spec)
        assert record.head_width is not None  # the bundle was checked: this model has a head
        assert record.modulation_width is not None
        device, embed = self.backend.device, self.engine(record, GraphName.TIME_EMBEDDING)
        table = run_once(device, embed, {"timestep": chain.timestep}, "time_table", (chain.length, record.head_width))
        return Head(
            device,
            self.engine(record, GraphName.MODULATION),
            self.engine(record, GraphName.DENOISE_STEP),
            self.engine(record, GraphName.PATH_MEANS),
            table,
            chain,
            self.bundle.manifest.token_dim,
            record.z_dim,
            record.modulation_width,
        )

    def engine(self, record: ModelRecord, name: GraphName) -> Engine:
        """The engine of a model's graph, made when it is first asked for. Raises BackendError or BundleError."""
        return self._graph_engine(record.graphs[name])

    def _graph_engine(self, graph: Graph) -> Engine:
        path = self.bundle.path(graph)
        if graph.file not in self._engines:
            self._engines[graph.file] = self.backend.load(path)
        engine = self._engines[graph.file]
        for kind, found, wanted in (
            ("inputs", engine.inputs, graph.inputs),
            ("outputs", engine.outputs, graph.outputs),
        ):
            if found != {binding.name for binding in wanted}:
                raise BundleError(f"{path} has other {kind} than the manifest says: {sorted(found)}; export it again")
        return engine

    @staticmethod
    def _whole_numbers(name: str, values: Sequence[int] | IntArray, limit: int) -> IntArray:
        """`values` as int64, each in 0 … limit - 1."""
        try:
            numbers = [operator.index(value) for value in values]
        except TypeError as error:
            raise UsageError(f"{name} is {values!r}; expected a list of whole numbers") from error
        if not numbers:
            raise UsageError(f"{name} is empty; expected at least one")
        for number in numbers:
            if not 0 <= number < limit:
                raise UsageError(f"{name} holds {number}; expected 0 to {limit - 1}")
        return np.array(numbers, np.int64)


def _decode(
    session: Session, seed: int, labels: IntArray, keys: IntArray, lanes: int, tell: Callable[[int], None]
) -> tuple[FloatArray, Counters]:
    """Tokens `[N, L, D]` of some images, and what they took."""
    counters = Counters()
    return Decoder(session, NoiseSource(seed), labels, keys, counters, tell, lanes=lanes).run(), counters


def make_options(**fields: object) -> DecodeOptions:
    """DecodeOptions from keyword arguments; raises UsageError for a name that is none of its fields."""
    unknown = sorted(set(fields) - set(DecodeOptions.__dataclass_fields__))
    if unknown:
        raise UsageError(
            f"unknown option {unknown[0]!r}; expected some of {', '.join(DecodeOptions.__dataclass_fields__)}"
        )
    return DecodeOptions(**fields)  # type: ignore[arg-type]  # values are checked by DecodeOptions itself
