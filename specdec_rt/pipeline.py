"""`load(bundle).generate(...)`: what a program that embeds the runtime calls."""

import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from specdec_rt.backend_choice import open_backend
from specdec_rt.backends.base import Backend
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import read_recipe
from specdec_rt.bundle import Bundle, load_bundle
from specdec_rt.config import DecodeOptions, check_whole_number
from specdec_rt.decode.decoder import Decoder, DecodingSetup
from specdec_rt.decode.draft_length import DraftLengthController
from specdec_rt.decode.exact import ExactVerifier
from specdec_rt.decode.paper import PaperVerifier
from specdec_rt.decode.round import Verifier
from specdec_rt.decode.session import Session
from specdec_rt.decode.stats import Counters, Stats
from specdec_rt.errors import UsageError
from specdec_rt.models import Models
from specdec_rt.noise import NoiseSource
from specdec_rt.pixels import decode_pixels, lay_patches, to_bytes
from specdec_rt.plan import Plan, Tuning, make_plan
from specdec_rt.types import Array, FloatArray, IntArray
from specdec_rt.workers import run_workers

__all__ = ["Pipeline", "Result", "load"]

DEFAULT_BATCH_SIZE = 16

Progress = Callable[[int, int], None]
"""`(tokens committed, tokens in all)`."""
MakeVerifier = Callable[[Session, Plan], Verifier]


@dataclass(frozen=True)
class Result:
    """What a request made."""

    images: Array | None
    """uint8 `[B, height, width, channels]`; None where the bundle makes tokens only"""
    tokens: FloatArray
    """float32 `[B, L, D]`"""
    labels: IntArray
    """`[B]`"""
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

    Calls from several threads take turns: they share engines and buffers. `workers` are pipelines on the same bundle
    that images are shared out to. `exact_verifier` and `paper_verifier` make what judges in these modes; benchmarks
    hand in what makes a subclass, to record verdicts or to force them.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        workers: Sequence["Pipeline"] = (),
        *,
        tuning: Tuning | None = None,
        exact_verifier: MakeVerifier = ExactVerifier,
        paper_verifier: MakeVerifier = PaperVerifier,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self._tuning = tuning or Tuning()
        self.models = Models(bundle, backend, self._tuning)
        self._exact_verifier = exact_verifier
        self._paper_verifier = paper_verifier
        self._workers = [self, *workers]
        self._controllers: dict[tuple[object, ...], DraftLengthController] = {}
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
        """Make one image for each of `labels [B]`.

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
        total, done = len(labels) * self.bundle.manifest.tokens, 0

        def count_tokens(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        with self._request():
            # Engines that are still missing are made before the clock runs, and before work that they might waste.
            count = min(len(self._workers), size, len(labels))
            setups = [worker.setup(options) for worker in self._workers[:count]]
            if self.bundle.manifest.decoder is not None:
                self.models.graph_engine(self.bundle.manifest.decoder.graph)
            parts, slots = (np.array_split(np.arange(whole), count) for whole in (len(labels), size))
            tasks = [
                partial(_decode, setup, seed, labels[part], keys[part], len(some))
                for setup, part, some in zip(setups, parts, slots, strict=True)
            ]
            started = time.perf_counter()
            made = [tasks[0](count_tokens)] if count == 1 else run_workers(tasks, count_tokens)
            tokens: FloatArray = np.concatenate([part for part, _ in made])
            images = self.draw(tokens)
            seconds = time.perf_counter() - started
        stats = Stats(mode=setups[0].plan.mode, backend=self.backend.name, images=len(labels), seconds=seconds)
        for _, counters in made:
            stats.add(counters)
        return Result(images, tokens, labels, stats)

    def draw(self, tokens: FloatArray) -> Array | None:
        """Tokens `[B, L, D]` as uint8 `[B, height, width, channels]`; None where the bundle makes tokens only."""
        manifest = self.bundle.manifest
        if manifest.image is None:
            return None
        if manifest.decoder is None:
            return to_bytes(lay_patches(tokens, manifest.image, manifest.family))
        with self._own_turn():
            decoder = self.models.graph_engine(manifest.decoder.graph)
            return to_bytes(decode_pixels(tokens, manifest.image, self.backend.device, decoder, self._tuning.capacity))

    def setup(self, options: DecodeOptions) -> DecodingSetup:
        """The models that a request needs, and how they decode. Raises as `generate` does.

        Setups of one pipeline share models and buffers: one batch at a time.
        """
        chain = self.models.chain(options.temperature)
        plan = make_plan(options, self.bundle.manifest, chain, self.backend.limits, self.backend.name, self._tuning)
        with self._own_turn():
            session = self.models.session(plan, chain)
            return DecodingSetup(plan, session, self._verifier(plan, session), self._controller(plan))

    def with_backend(self, backend: Backend) -> "Pipeline":
        """A pipeline without workers that is like this one in all but the backend."""
        return Pipeline(
            self.bundle,
            backend,
            tuning=self._tuning,
            exact_verifier=self._exact_verifier,
            paper_verifier=self._paper_verifier,
        )

    def _verifier(self, plan: Plan, session: Session) -> Verifier | None:
        if plan.mode == "paper":
            return self._paper_verifier(session, plan)
        return self._exact_verifier(session, plan) if plan.mode == "exact" else None

    def _controller(self, plan: Plan) -> DraftLengthController | None:
        """What chooses draft lengths automatically. It is kept for all requests whose rounds cost the same."""
        if not plan.automatic_length:
            return None
        mask = None if plan.draft_step_mask is None else plan.draft_step_mask.tobytes()
        key = (plan.draft, mask, plan.guidance == 1, plan.schedule.steps)
        return self._controllers.setdefault(key, DraftLengthController(plan.schedule.known, plan.draft_length))

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
    setup: DecodingSetup, seed: int, labels: IntArray, keys: IntArray, slots: int, progress: Callable[[int], None]
) -> tuple[FloatArray, Counters]:
    """Tokens `[B, L, D]` of some images, and what they took."""
    counters = Counters()
    return Decoder(setup, NoiseSource(seed), labels, keys, counters, progress, slots=slots).run(), counters


def make_options(**fields: object) -> DecodeOptions:
    """DecodeOptions from keyword arguments; raises UsageError for a name that is none of its fields."""
    unknown = sorted(set(fields) - set(DecodeOptions.__dataclass_fields__))
    if unknown:
        raise UsageError(
            f"unknown option {unknown[0]!r}; expected some of {', '.join(DecodeOptions.__dataclass_fields__)}"
        )
    return DecodeOptions(**fields)  # type: ignore[arg-type]  # values are checked by DecodeOptions itself
