"""A chain over two small random networks, behind the Engine protocol: decoding runs on it as on real engines.

`toy_setup` makes images of it: a few tokens, each drawn in the light of the one before it. `self_draft_setup` has no
draft but the target's own head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from specdec_rt.ar_schedule import raster_schedule
from specdec_rt.backends.base import BoundCall
from specdec_rt.backends.host import HostDevice
from specdec_rt.capacity import Capacity
from specdec_rt.chain import Chain, ChainSpec, compile_chain
from specdec_rt.config import Mode
from specdec_rt.decode.decoder import DecodingSetup
from specdec_rt.decode.exact import ExactVerifier
from specdec_rt.decode.head import Head, HeadEngines
from specdec_rt.decode.model import Model
from specdec_rt.decode.session import Session
from specdec_rt.draft_steps import choose_draft_steps
from specdec_rt.families.backbone import Backbone, BackboneCall
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import Purpose
from specdec_rt.plan import Plan
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["DIM", "IMAGE_CHAIN", "TOY_CHAIN", "TableDraws", "self_draft_setup", "toy_head", "toy_setup"]

DIM, HIDDEN = 2, 16
ALIGNED = 64
"""Values of modulation of which several steps' are made at a time: engines take what begins at a multiple of so many.
Most of them are unused."""
PULL = 0.1
"""What a token's noise prediction takes of the token before it."""
TOY_CHAIN = compile_chain(
    ChainSpec(steps=8, t_max=960, drop_last=1, final_std=0.15, variance="large", temperature=1.0, emit="mean")
)
IMAGE_CHAIN = compile_chain(
    ChainSpec(steps=4, t_max=600, drop_last=1, final_std=1.0, variance="large", temperature=1.0, emit="sample")
)
"""Short, with much of its noise in the last transition, which is shown: a bias in how noise is used is seen early."""


@dataclass(frozen=True)
class RandomNet:
    """ε̂(x, t): a random two-layer network, the same for every row."""

    of_state: FloatArray
    of_time: FloatArray
    bias: FloatArray
    out: FloatArray

    @classmethod
    def of(cls, seed: int) -> "RandomNet":
        rng = np.random.default_rng(seed)
        return cls(
            rng.normal(size=(DIM, HIDDEN)),
            rng.normal(size=HIDDEN),
            rng.normal(size=HIDDEN),
            rng.normal(size=(HIDDEN, DIM)) / HIDDEN**0.5,
        )

    def mixed(self, other: "RandomNet", share: float) -> "RandomNet":
        """A network between this one and another."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return RandomNet(*((1 - share) * mine + share * theirs for mine, theirs in pairs))

    def __call__(self, state: Array, time: Array) -> Array:
        hidden = np.tanh(state @ self.of_state + time[..., None] * self.of_time + self.bias)
        return np.asarray(0.6 * state + hidden @ self.out)


class ModulationEngine:
    """`modulation`: the time table's one column, which is the time itself, the condition, and zeros."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            outputs["modulation"][:, :1] = inputs["time_table"][inputs["step"]]
            outputs["modulation"][:, 1 : 1 + DIM] = inputs["z"][0][inputs["row"]]

        return call


@dataclass(frozen=True)
class StepEngine:
    """`denoise_step` of a random net."""

    net: RandomNet

    def epsilon(self, state: Array, timestep: int, z: Array) -> Array:
        """What it predicts of one state at one training step."""
        return self.net(state, np.array(timestep / 500 - 1)) + PULL * z

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            step = inputs["step"]
            of_state, of_epsilon, std, _ = inputs["coefficients"][step][..., None].swapaxes(0, 1)
            time, z = inputs["modulation"][:, 0, 0], inputs["modulation"][:, 0, 1 : 1 + DIM]
            epsilon = self.net(inputs["state"], time) + PULL * z
            outputs["mean"][:] = of_state * inputs["state"] + of_epsilon * epsilon
            outputs["next_state"][:] = outputs["mean"] + std * inputs["noise"]

        return call


@dataclass(frozen=True)
class PathMeansEngine:
    """`path_means` of a random net."""

    net: RandomNet

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            state = inputs["path"][:, :-1]
            modulation = inputs["modulation"][:, :, 0].swapaxes(0, 1)
            epsilon = self.net(state, modulation[..., 0]) + PULL * modulation[..., 1 : 1 + DIM]
            coefficients = inputs["coefficients"]
            outputs["mean"][:] = coefficients[:, :1] * state + coefficients[:, 1:2] * epsilon

        return call


def toy_head(
    chain: Chain,
    *,
    draft: bool,
    share: float = 0.06,
    modulation_width: int = 1 + DIM,
    capacity: Capacity = Capacity(),
) -> Head:
    """The target's head, or a draft's: the same network moved some way towards another one."""
    net = RandomNet.of(0)
    if draft:
        net = net.mixed(RandomNet.of(1), share)
    time_table = (chain.timestep[:, None] / 500 - 1).astype(np.float32)
    engines = HeadEngines(ModulationEngine(), StepEngine(net), PathMeansEngine(net))
    sizes = {"token_dim": DIM, "z_dim": DIM, "modulation_width": modulation_width}
    return Head(HostDevice(), engines, time_table, chain, **sizes, capacity=capacity)


class ToyBackbone(Backbone):
    """The condition of a token is the token before it; of an image's first, 0."""

    def __init__(self, device: HostDevice) -> None:
        super().__init__(device, None, DIM, 0, branches=1)  # type: ignore[arg-type]  # it has no engine
        self._calls: dict[tuple[int, int], tuple[BackboneCall, Array]] = {}

    def prepare(self, positions: PositionBatch, copy: int = 0) -> tuple[BackboneCall, IntArray]:
        """As in `Backbone`."""
        rows = len(positions.image_index)
        if (rows, copy) not in self._calls:
            tokens, first = np.zeros((rows, DIM), np.float32), np.zeros((rows, 1), np.bool_)
            z = np.zeros_like(tokens)

            def run() -> None:
                z[:] = np.where(first, 0, tokens)

            self._calls[rows, copy] = BackboneCall((), tokens, np.zeros(rows, np.int64), z, (run,)), first
        call, first = self._calls[rows, copy]
        first[:, 0] = positions.position == 0
        before = np.maximum(positions.position - 1, 0)
        call.token_index[:] = positions.image_index * positions.order.shape[1] + before
        return call, np.arange(rows)[None]

    def catch_up(self, order: IntArray, known: IntArray, tokens: FloatArray, steps: int) -> int:  # noqa: ARG002  # the protocol's
        """As in `Backbone`."""
        return 0


def toy_setup(tokens: int, *, mode: Mode = "exact") -> DecodingSetup:
    """A target and a draft for images of so many tokens."""
    device, heads = HostDevice(), [toy_head(IMAGE_CHAIN, draft=draft, share=0.4) for draft in (False, True)]
    target, draft = (Model(ToyBackbone(device), head) for head in heads)
    plan = Plan(
        mode=mode,
        schedule=raster_schedule(tokens),
        random_order=False,
        prefill=0,
        draft_length=tokens,
        draft_step_mask=None,
        draft="toy",
        tau=1.0,
        guidance=1.0,
        guidance_schedule="constant",
        emit_mean=False,
    )
    return _setup(plan, Session(device=device, target=None if mode == "draft" else target, draft=draft))


def self_draft_setup(chain: Chain, steps: int, *, mode: Mode = "exact", min_resume_steps: int) -> DecodingSetup:
    """A target that drafts on so many steps of its chain, whole chains and what is left of them; of one token each."""
    device, step_mask = HostDevice(), choose_draft_steps(chain, steps)
    target = Model(ToyBackbone(device), toy_head(chain, draft=False, modulation_width=ALIGNED))
    plan = replace(
        toy_setup(1, mode=mode).plan,
        draft=None,
        draft_step_mask=step_mask,
        resume_step_mask=step_mask,
        min_resume_steps=min_resume_steps,
        emit_mean=True,
    )
    masks = {"draft_step_mask": step_mask, "resume_step_mask": step_mask}
    return _setup(plan, Session(device=device, target=target, draft=None, **masks))


def _setup(plan: Plan, session: Session) -> DecodingSetup:
    return DecodingSetup(plan, session, ExactVerifier(session, plan) if plan.mode == "exact" else None)


class TableDraws:
    """As `noise.Draws`, drawn beforehand for all tokens of all images: quick where there are many."""

    def __init__(self, seed: int | list[int], images: int, tokens: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._shape = images, tokens
        self._tables: dict[tuple[int, ...], FloatArray] = {}

    def normal(
        self, image: IntArray, token: IntArray, purpose: Purpose, steps: int, dim: int, attempt: int = 0
    ) -> FloatArray:
        """As in `Draws`."""
        drawn = self._table((purpose, attempt, steps, dim), self._rng.standard_normal)
        return drawn[image, token].astype(np.float32)

    def uniform(self, image: IntArray, token: IntArray, purpose: Purpose, count: int, attempt: int = 0) -> FloatArray:
        """As in `Draws`."""
        return self._table((purpose, attempt, count), self._rng.random)[image, token]

    def _table(
        self, key: tuple[Purpose, *tuple[int, ...]], draw: Callable[[tuple[int, ...]], FloatArray]
    ) -> FloatArray:
        if key not in self._tables:
            self._tables[key] = draw((*self._shape, *key[2:]))
        return self._tables[key]
