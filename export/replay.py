"""Replays what a MAR reference recorded (orders, noise, states) through the engines of a bundle.

A reference is a `.npz` file of the arrays that `docs/mar.md` lists. Its sizes, known tokens, guidance scales and
numbers of steps are read from the file and from the bundle's manifest: any file of this form can be replayed.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from specdec_rt.decode.draft import Model
from specdec_rt.decode.loop import Decoder

from export.comparison import ALLOWANCE, IMAGE_TOLERANCE, TABLE_TOLERANCE, TOLERANCE, Comparison, relative_error
from export.recorded_form import betas, unpatchify, variances
from export.recorded_noise import RecordedNoise
from export.reference import RecordingError, Reference
from specdec_rt import DecodeOptions, Pipeline, UsageError
from specdec_rt.chain import Chain
from specdec_rt.decode.stats import Counters
from specdec_rt.errors import BackendError
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.manifest import GraphName
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["replay"]

Found = Mapping[str, tuple[Array, Callable[[], Array]]]
"""For each quantity, what the engines gave, and a function that looks up what was recorded."""


def replay(pipeline: Pipeline, path: Path, progress: Callable[[str], None] = lambda _: None) -> list[Comparison]:
    """Compare every quantity of the recorded file with what the bundle's engines give.

    `progress` is called with a line before each comparison; whole images can take minutes. Raises RecordingError
    where the file cannot be read, or the bundle is of another family.
    """
    manifest = pipeline.bundle.manifest
    if manifest.family != "mar":
        raise RecordingError(f"bundle {manifest.name!r} is of family {manifest.family!r}; references are of 'mar'")
    return list(_Replay(pipeline, Reference(path), progress).comparisons())


@dataclass(frozen=True)
class _Replay:
    pipeline: Pipeline
    reference: Reference
    progress: Callable[[str], None]

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
        """Compare the quantities `names`, all of which `evaluate` gives."""
        self.progress(f"comparing {', '.join(names)}")
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
                yield Comparison(name, tolerance, relative_error(name, given, look_up()))
            except RecordingError as error:
                yield Comparison(name, tolerance, problem=str(error))

    def _with_recorded(self, found: Mapping[str, Array]) -> Found:
        return {name: (value, partial(self.reference.__getitem__, name)) for name, value in found.items()}

    # --- the chain ---------------------------------------------------------------------------------

    def _chain(self) -> Chain:
        """The bundle's chain. Raises RecordingError where it is not the reference's: stock, with as many steps."""
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
        return self._with_recorded({"betas": betas(chain), "timestep_map": chain.timestep[::-1]})

    # --- one evaluation ----------------------------------------------------------------------------

    def _conditions(self, count: int) -> Found:
        """The conditions z of all unknown tokens where `count` are known, with the label and without."""
        manifest, labels = self.pipeline.bundle.manifest, self._labels()
        images = len(labels)
        unknown = self.reference.whole(f"mask_{count}", images, manifest.tokens, below=2)
        tokens = self.reference.floats("tokens", images, manifest.tokens, manifest.token_dim)
        if (unknown.sum(axis=1) != manifest.tokens - count).any():
            raise RecordingError(f"mask_{count} does not hold 0 for {count} tokens of each image and 1 for the others")
        if count == manifest.tokens:
            nothing = np.zeros(0)  # all tokens are known: there is nothing to compare
            return {name: (nothing, lambda: nothing) for name in (f"z_{count}", f"z_uncond_{count}")}
        order = np.argsort(unknown, axis=1, kind="stable")  # known positions first
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
        """One transition of each recorded row, as prediction, x̂₀, mean and variance.

        Coefficients are an input of the engine: each of these quantities comes from a run with other coefficients.
        """
        chain = self._chain()
        row = chain.length - 1 - self.reference.whole("head_step", None, below=chain.length)
        timestep = chain.timestep[row]
        ones = np.ones(len(row))
        epsilon, _ = self._evaluate(timestep, np.stack([0 * ones, ones, ones, 0 * ones], axis=1))
        clean, _ = self._evaluate(
            timestep, np.stack([chain.prediction_state[row], chain.prediction_epsilon[row], ones, 0 * ones], axis=1)
        )
        sigma = variances(chain)  # [n, 2]
        mean, std = self._evaluate(timestep, np.concatenate([chain.coefficients[:, :2], sigma], axis=1)[row])
        output = [epsilon]
        if std is None:
            std = np.broadcast_to(sigma[row, :1], mean.shape)
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
        """Mean and learned std `[R, D]` of one transition of each recorded row, with its own `coefficients [R, 4]`."""
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
        """Some tokens through the whole denoising chain, without guidance ("plain") or with it ("cfg")."""
        chain, manifest, sampling = self._chain(), self.pipeline.bundle.manifest, self.reference.sampling()
        start = self.reference.floats(f"chain_{kind}_xT", None, manifest.token_dim)
        scale = [[1.0]] if kind == "plain" else [[sampling.guidance], [1 - sampling.guidance]]
        doubled = len(scale) * len(start)
        z = self.reference.floats(f"chain_{kind}_z", doubled, manifest.target.z_dim)
        noise = self.reference.floats(f"chain_{kind}_noise", chain.length, None, manifest.token_dim)
        if noise.shape[1] < len(start):
            raise RecordingError(f"chain_{kind}_noise has {noise.shape[1]} rows; expected {doubled}")
        head = self._target(DecodeOptions(mode="target", temperature=sampling.temperature)).head
        drawn = head.sample(
            z.reshape(len(scale), len(start), -1),
            np.tile(np.array(scale), (1, len(start))),
            start,
            noise[:, : len(start)].swapaxes(0, 1),
        )
        return self._with_recorded({f"chain_{kind}_x": drawn.path[:, -1]})

    def _image(self, kind: str) -> Found:
        """Whole images by the decoding loop in mode `target`, without guidance ("plain") or with it ("cfg")."""
        self._chain()
        sampling, labels = self.reference.sampling(), self._labels()
        options = DecodeOptions(
            mode="target",
            ar_steps=sampling.ar_steps,
            guidance=1.0 if kind == "plain" else sampling.guidance,
            guidance_schedule=sampling.schedule,
            temperature=sampling.temperature,
        )
        session = self.pipeline.session(options)
        manifest = self.pipeline.bundle.manifest
        shape = (len(labels), manifest.tokens, manifest.token_dim)
        noise = RecordedNoise.of(self.reference, kind, sampling.ar_steps, shape)
        tokens = Decoder(session, noise, labels, np.arange(len(labels)), Counters(), lambda _: None).run()
        recorded = self.reference.floats(f"image_{kind}", None, None, None, None)
        return self._with_recorded({f"image_{kind}": unpatchify(tokens, recorded.shape)})

    def _target(self, options: DecodeOptions) -> Model:
        return self.pipeline.session(options).target
