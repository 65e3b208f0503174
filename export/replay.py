"""Replays what a MAR reference recorded (orders, noise, states) through the engines of a bundle.

A reference is a `.npz` file of the arrays named in `docs/mar.md`. Sizes, known tokens, scales and steps are
read from it and from the bundle's manifest, so any file of that form can be replayed.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from specdec_rt.decode.draft import Model
from specdec_rt.decode.loop import Decoder

from export.reference import RecordingError, Reference
from specdec_rt import DecodeOptions, Pipeline, UsageError
from specdec_rt.ar_schedule import cosine_schedule
from specdec_rt.chain import Chain
from specdec_rt.decode.stats import Counters
from specdec_rt.errors import BackendError
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.manifest import GraphName, Precision
from specdec_rt.noise import Purpose
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["Comparison", "replay"]

TOLERANCE = 1e-4
"""Relative L2 error that single evaluations, and single chains of denoising steps, may show."""
IMAGE_TOLERANCE = 1e-3
"""The same after a whole image: in it, errors feed back."""
TABLE_TOLERANCE = 1e-6
"""The same of the chain's own numbers, which are made in double precision."""
ALLOWANCE: dict[Precision, float] = {"fp32": 1, "fp16": 50, "bf16": 200}
"""How much more may be seen of a model whose weights were rounded."""


@dataclass(frozen=True)
class Comparison:
    """One recorded quantity."""

    name: str
    tolerance: float
    error: float | None = None
    """relative L2 error of what the engines gave; None where nothing could be compared"""
    problem: str = ""
    """why not"""

    @property
    def passed(self) -> bool:
        """Whether it was compared and is within its tolerance."""
        return self.error is not None and self.error <= self.tolerance


Found = Mapping[str, tuple[Array, Callable[[], Array]]]
"""What the engines gave for each quantity, and what looks up the recorded value."""


def replay(pipeline: Pipeline, path: Path) -> list[Comparison]:
    """Compare every quantity of the recorded file with what the bundle's engines give.

    Raises RecordingError where the file cannot be read, or the bundle is of another kind.
    """
    manifest = pipeline.bundle.manifest
    if manifest.family != "mar":
        raise RecordingError(f"bundle {manifest.name!r} is of family {manifest.family!r}; references are of 'mar'")
    return list(_Replay(pipeline, Reference(path)).comparisons())


@dataclass(frozen=True)
class _Replay:
    pipeline: Pipeline
    reference: Reference

    def comparisons(self) -> Iterator[Comparison]:
        known = sorted(int(name[5:]) for name in self.reference if re.fullmatch(r"mask_\d+", name))
        yield from self._compare(["betas", "timestep_map"], self._chain_tables, TABLE_TOLERANCE)
        if not known:
            yield Comparison("z_K", TOLERANCE, problem="the file has no array 'mask_K'")
        for count in known:
            yield from self._compare([f"z_{count}", f"z_uncond_{count}"], partial(self._conditions, count), TOLERANCE)
        names = ["head_timestep", "head_out", "p_mean", "p_log_variance", "p_xstart"]
        yield from self._compare(names, self._head, TOLERANCE)
        yield from self._compare(["chain_plain_x"], lambda: self._whole_chain("plain"), TOLERANCE)
        yield from self._compare(["chain_cfg_x"], lambda: self._whole_chain("cfg"), TOLERANCE)
        yield from self._compare(["image_plain"], lambda: self._image("plain"), IMAGE_TOLERANCE)
        yield from self._compare(["image_cfg"], lambda: self._image("cfg"), IMAGE_TOLERANCE)

    def _compare(self, names: list[str], evaluate: Callable[[], Found], tolerance: float) -> Iterator[Comparison]:
        """The quantities `names`, which one evaluation gives."""
        if tolerance > TABLE_TOLERANCE:
            tolerance *= ALLOWANCE[self.pipeline.bundle.manifest.precision]
        try:
            found = evaluate()
        except (RecordingError, UsageError, BackendError) as error:
            for name in names:
                yield Comparison(name, tolerance, problem=str(error))
            return
        for name in names:
            given, look_up = found[name]
            try:
                yield Comparison(name, tolerance, _relative_error(name, given, look_up()))
            except RecordingError as error:
                yield Comparison(name, tolerance, problem=str(error))

    def _with_recorded(self, found: Mapping[str, Array]) -> Found:
        return {name: (value, partial(self.reference.__getitem__, name)) for name, value in found.items()}

    # --- the chain ---------------------------------------------------------------------------------

    def _chain(self) -> Chain:
        """The bundle's chain, which must be the reference's own: all steps, no noise at the last."""
        chain = self._target(DecodeOptions(mode="target")).head.chain
        steps, spec = len(self.reference["betas"]), chain.spec
        if chain.length != steps or spec.final_std:
            raise RecordingError(
                f"the bundle's chain has {chain.length} transitions and final_std {spec.final_std}; the reference's "
                f"has {steps} and 0: export with --chain stock --steps {steps}"
            )
        return chain

    def _chain_tables(self) -> Found:
        chain = self._chain()
        return self._with_recorded({"betas": _betas(chain), "timestep_map": chain.timestep[::-1]})

    # --- one evaluation ----------------------------------------------------------------------------

    def _conditions(self, count: int) -> Found:
        """Where a token is unknown, z with its label and without."""
        manifest, labels = self.pipeline.bundle.manifest, self._labels()
        images = len(labels)
        unknown = self.reference.whole(f"mask_{count}", images, manifest.tokens, below=2)
        tokens = self.reference.floats("tokens", images, manifest.tokens, manifest.token_dim)
        if (unknown.sum(axis=1) != manifest.tokens - count).any():
            raise RecordingError(f"mask_{count} does not hold 0 for {count} tokens of each image and 1 for the others")
        if count == manifest.tokens:
            nothing = np.zeros(0)  # no token is unknown: there is nothing to compare
            return {name: (nothing, lambda: nothing) for name in (f"z_{count}", f"z_uncond_{count}")}
        order = np.argsort(unknown, axis=1, kind="stable")  # the known places first
        span = PositionBatch.of(order, np.array([0, count, manifest.tokens]), np.ones(images, np.int64), 1)
        found = {}
        for name, of in ((f"z_{count}", labels), (f"z_uncond_{count}", np.full(images, manifest.classes))):
            backbone = self.pipeline.session(DecodeOptions(mode="target", guidance=1.0)).target.backbone
            backbone.begin(of)
            z = backbone.condition(tokens, span)[0]
            shape = (images, manifest.tokens, z.shape[1])
            found[name] = (z, partial(self._at, name, shape, span))
        return found

    def _at(self, name: str, shape: tuple[int, ...], span: PositionBatch) -> Array:
        return self.reference.floats(name, *shape)[span.owner, span.place]

    def _labels(self) -> IntArray:
        return self.reference.whole("labels", None, below=self.pipeline.bundle.manifest.classes)

    def _head(self) -> Found:
        """One transition a row. Coefficients are an engine's input, so they can be chosen to show each part of it."""
        chain = self._chain()
        row = chain.length - 1 - self.reference.whole("head_step", None, below=chain.length)
        timestep = chain.timestep[row]
        ones = np.ones(len(row))
        epsilon, _ = self._evaluate(timestep, np.stack([0 * ones, ones, ones, 0 * ones], axis=1))
        clean, _ = self._evaluate(
            timestep, np.stack([chain.prediction_state[row], chain.prediction_epsilon[row], ones, 0 * ones], axis=1)
        )
        variances = _variances(chain)
        mean, std = self._evaluate(timestep, np.concatenate([chain.coefficients[:, :2], variances], axis=1)[row])
        output = [epsilon]
        if std is None:
            std = np.broadcast_to(variances[row, :1], mean.shape)
        else:
            _, share = self._evaluate(timestep, np.stack([0 * ones, ones, ones, 2 * ones], axis=1))
            assert share is not None
            output.append(np.log(share) - 1)
        return self._with_recorded(
            {
                "head_timestep": timestep,
                "head_out": np.concatenate(output, axis=1),
                "p_mean": mean,
                "p_log_variance": 2 * np.log(std),
                "p_xstart": clean,
            }
        )

    def _evaluate(self, timestep: IntArray, coefficients: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """Mean and std of one transition from the recorded states, whose row r has `coefficients [R, 4]`."""
        manifest = self.pipeline.bundle.manifest
        record, rows = manifest.target, len(timestep)
        state = self.reference.floats("head_x", rows, manifest.token_dim)
        z = self.reference.floats("head_c", rows, record.z_dim)
        assert record.head_width is not None
        assert record.modulation_width is not None
        table = np.empty((len(state), record.head_width), np.float32)
        self.pipeline.engine(record, GraphName.TIME_EMBEDDING).bind({"timestep": timestep}, {"time_table": table})()
        outputs = {name: np.empty_like(state) for name in ("next_state", "mean")}
        engine = self.pipeline.engine(record, GraphName.DENOISE_STEP)
        if "std" in engine.outputs:
            outputs["std"] = np.empty_like(state)
        row = np.arange(len(state))
        modulation = np.empty((len(state), record.modulation_width), np.float32)
        make = self.pipeline.engine(record, GraphName.MODULATION)
        make.bind({"z": z[None], "row": row, "time_table": table, "step": row}, {"modulation": modulation})()
        inputs = {
            "state": state,
            "modulation": modulation[:, None],
            "guidance": np.ones((1, len(state)), np.float32),
            "coefficients": coefficients.astype(np.float32),
            "step": row,
            "noise": np.zeros_like(state),
        }
        engine.bind(inputs, outputs)()
        return outputs["mean"], outputs.get("std")

    # --- chains and images -------------------------------------------------------------------------

    def _whole_chain(self, kind: str) -> Found:
        chain, manifest, recording = self._chain(), self.pipeline.bundle.manifest, self.reference.recording()
        start = self.reference.floats(f"chain_{kind}_xT", None, manifest.token_dim)
        scale = [[1.0]] if kind == "plain" else [[recording.guidance], [1 - recording.guidance]]
        doubled = len(scale) * len(start)
        z = self.reference.floats(f"chain_{kind}_z", doubled, manifest.target.z_dim)
        noise = self.reference.floats(f"chain_{kind}_noise", chain.length, None, manifest.token_dim)
        if noise.shape[1] < len(start):
            raise RecordingError(f"chain_{kind}_noise has {noise.shape[1]} rows; expected {doubled}")
        head = self._target(DecodeOptions(mode="target", temperature=recording.temperature)).head
        drawn = head.sample(
            z.reshape(len(scale), len(start), -1),
            np.tile(np.array(scale), (1, len(start))),
            start,
            noise[:, : len(start)].swapaxes(0, 1),
        )
        return self._with_recorded({f"chain_{kind}_x": drawn.path[:, -1]})

    def _image(self, kind: str) -> Found:
        """Whole images by the decoding loop itself, in mode `target`."""
        self._chain()
        recording, labels = self.reference.recording(), self._labels()
        options = DecodeOptions(
            mode="target",
            ar_steps=recording.ar_steps,
            guidance=1.0 if kind == "plain" else recording.guidance,
            guidance_schedule=recording.schedule,
            temperature=recording.temperature,
        )
        session = self.pipeline.session(options)
        manifest = self.pipeline.bundle.manifest
        shape = (len(labels), manifest.tokens, manifest.token_dim)
        noise = RecordedNoise.of(self.reference, kind, recording.ar_steps, shape)
        tokens = Decoder(session, noise, labels, np.arange(len(labels)), Counters(), lambda _: None).run()
        recorded = self.reference.floats(f"image_{kind}", None, None, None, None)
        return self._with_recorded({f"image_{kind}": _unpatchify(tokens, recorded.shape)})

    def _target(self, options: DecodeOptions) -> Model:
        return self.pipeline.session(options).target


@dataclass(frozen=True)
class RecordedNoise:
    """The recorded draws in the place of those that decoding would make."""

    uniforms: FloatArray
    """`[B, L]` sorting them gives the recorded orders"""
    chains: FloatArray
    """`[B, L, n + 1, D]` x_T, then each transition's noise, at the token's place"""

    @classmethod
    def of(cls, reference: Reference, kind: str, ar_steps: int, shape: tuple[int, int, int]) -> "RecordedNoise":
        """The draws of `image_{kind}`, tokens of `shape [B, L, D]`: step i's rows run in (image, position) order."""
        images, tokens, dim = shape
        # Recorded from the token that is masked longest.
        order = reference.whole("orders", images, tokens, below=tokens)[:, ::-1]
        if not (np.sort(order, axis=1) == np.arange(tokens)).all():
            raise RecordingError("orders are not permutations of an image's places")
        known = cosine_schedule(tokens, ar_steps).known
        chains: FloatArray = np.zeros(0)
        for step in range(ar_steps):
            start = reference.floats(f"image_{kind}_xT_{step}", None, dim)
            noise = reference.floats(f"image_{kind}_noise_{step}", None, None, dim)
            place = np.sort(order[:, known[step] : known[step + 1]], axis=1)
            if place.size != len(start) or noise.shape[1] < len(start):
                raise RecordingError(
                    f"image_{kind}_xT_{step} has {len(start)} rows, image_{kind}_noise_{step} {noise.shape[1]}; "
                    f"expected {place.size}, the tokens of AR step {step + 1} of {ar_steps}"
                )
            drawn = np.concatenate([start[None], noise[:, : len(start)]])  # [n + 1, rows, D]
            if step == 0:
                chains = np.zeros((images, tokens, len(drawn), dim), np.float32)
            if len(drawn) != chains.shape[2]:
                raise RecordingError(
                    f"image_{kind}_noise_{step} has {len(noise)} steps, the first {chains.shape[2] - 1}"
                )
            chains[np.repeat(np.arange(images), place.shape[1]), place.ravel()] = drawn.swapaxes(0, 1)
        uniforms = np.empty(order.shape)
        np.put_along_axis(uniforms, order, (np.arange(tokens) + 0.5)[None] / tokens, axis=1)
        return cls(uniforms, chains)

    def normal(
        self,
        image: IntArray,
        token: IntArray,
        purpose: Purpose,
        steps: int,
        dim: int,
        attempt: int = 0,  # noqa: ARG002  # the protocol's
    ) -> FloatArray:
        """As in `Draws`."""
        if purpose != Purpose.CHAIN or self.chains.shape[2:] != (steps, dim):
            raise RecordingError(f"the recorded chains are {list(self.chains.shape[2:])}, not {[steps, dim]}")
        return self.chains[image, token]

    def uniform(self, image: IntArray, token: IntArray, purpose: Purpose, count: int, attempt: int = 0) -> FloatArray:  # noqa: ARG002
        """As in `Draws`."""
        assert purpose == Purpose.ORDER
        return self.uniforms[image]


def _relative_error(name: str, found: Array, recorded: Array) -> float:
    """Relative L2 error; of recorded zeros, 0 where they were found."""
    if found.shape != recorded.shape or recorded.dtype.kind not in "biuf":
        raise RecordingError(
            f"{name} is {recorded.dtype} {list(recorded.shape)}; the bundle gives numbers {list(found.shape)}"
        )
    wanted = recorded.astype(np.float64)
    difference, size = np.linalg.norm(found.astype(np.float64) - wanted), np.linalg.norm(wanted)
    if difference == 0:
        return 0.0
    return float(difference / size) if size > 0 else math.inf


def _betas(chain: Chain) -> FloatArray:
    """`[n]`: the respaced β, least noisy step first."""
    alpha_bar: FloatArray = 1 / np.square(chain.prediction_state[::-1])
    return np.asarray(1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]]))


def _variances(chain: Chain) -> FloatArray:
    """`[n, 2]` σ and log σ range before temperature; at the last step too, whose noise the chain leaves out."""
    variances: FloatArray = chain.coefficients[:, 2:] / np.array([chain.spec.temperature, 1])
    last = chain.final_density_std / chain.spec.temperature
    learned = chain.spec.variance == "learned"
    variances[-1] = last, np.log(_betas(chain)[0]) / 2 - np.log(last) if learned else 0
    return variances


def _unpatchify(tokens: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Tokens `[B, L, D]` as latents `[B, C, h, w]` of that shape: raster order, a token's values channel by channel."""
    _, channels, height, width = shape
    channels = max(channels, 1)
    patch = max(round((tokens.shape[2] / channels) ** 0.5), 1)
    grid: Any = (len(tokens), height // patch, width // patch, channels, patch, patch)
    if tokens.size != np.prod(grid):
        raise RecordingError(f"the recorded image is {list(shape)}; {list(tokens.shape)} tokens do not tile it")
    return np.asarray(tokens.reshape(grid).transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width))
