"""A chain over two small random networks, behind the Engine protocol: decoding runs on it as on real engines.

`toy_session` makes images of it: a few tokens, each drawn in the light of the one before it. `self_session` has no
draft but the target's own head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from specdec_rt.decode.chain import Head
from specdec_rt.decode.draft import Model
from specdec_rt.decode.loop import Session
from specdec_rt.decode.steps import Steps

from specdec_rt.ar_schedule import raster_schedule
from specdec_rt.backends.base import BoundCall
from specdec_rt.backends.host import HostDevice
from specdec_rt.chain import Chain, ChainSpec, compile_chain
from specdec_rt.draft_steps import choose_draft_steps
from specdec_rt.families.backbone import Ask, Backbone
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import Purpose
from specdec_rt.plan import Plan
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["DIM", "IMAGE_CHAIN", "TOY_CHAIN", "TableNoise", "self_session", "toy_head", "toy_session"]

DIM, HIDDEN = 2, 16
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
    """`modulation`: the time table's one column, which is the time itself, and the condition."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            outputs["modulation"][:, :1] = inputs["time_table"][inputs["step"]]
            outputs["modulation"][:, 1:] = inputs["z"][0][inputs["row"]]

        return call


@dataclass(frozen=True)
class StepEngine:
    """`denoise_step` of a random net."""

    net: RandomNet

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            step = inputs["step"]
            of_state, of_epsilon, std, _ = inputs["coefficients"][step][..., None].swapaxes(0, 1)
            time, z = np.split(inputs["modulation"][:, 0], [1], axis=1)
            epsilon = self.net(inputs["state"], time[:, 0]) + PULL * z
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
            time, z = np.split(inputs["modulation"][:, :, 0].swapaxes(0, 1), [1], axis=-1)
            epsilon = self.net(state, time[..., 0]) + PULL * z
            coefficients = inputs["coefficients"]
            outputs["mean"][:] = coefficients[:, :1] * state + coefficients[:, 1:2] * epsilon

        return call


def toy_head(chain: Chain, *, draft: bool, share: float = 0.06, z_dim: int = 1) -> Head:
    """The target's head, or a draft's: the same network moved some way towards another one."""
    net = RandomNet.of(0)
    if draft:
        net = net.mixed(RandomNet.of(1), share)
    time_table = (chain.timestep[:, None] / 500 - 1).astype(np.float32)
    engines = ModulationEngine(), StepEngine(net), PathMeansEngine(net)
    return Head(HostDevice(), *engines, time_table, chain, DIM, z_dim=z_dim, modulation_width=1 + z_dim)


class ToyBackbone(Backbone):
    """The condition of a token is the token before it; of an image's first, 0."""

    def __init__(self, device: HostDevice) -> None:
        super().__init__(device, None, DIM, 0, branches=1)  # type: ignore[arg-type]  # it has no engine
        self._asks: dict[tuple[int, int], tuple[Ask, Array]] = {}

    def ask(self, span: PositionBatch, slot: int = 0) -> tuple[Ask, IntArray]:
        """As in `Backbone`."""
        rows = len(span.owner)
        if (rows, slot) not in self._asks:
            tokens, first = np.zeros((rows, DIM), np.float32), np.zeros((rows, 1), np.bool_)
            z = np.zeros_like(tokens)

            def call() -> None:
                z[:] = np.where(first, 0, tokens)

            self._asks[rows, slot] = Ask((), tokens, np.zeros(rows, np.int64), z, (call,)), first
        ask, first = self._asks[rows, slot]
        first[:, 0] = span.place == 0
        ask.token_index[:] = span.owner * span.order.shape[1] + np.maximum(span.place - 1, 0)
        return ask, np.arange(rows)[None]

    def catch_up(self, order: IntArray, known: IntArray, steps: int) -> Ask | None:  # noqa: ARG002  # the protocol's
        """As in `Backbone`."""
        return None


def toy_session(tokens: int) -> Session:
    """A target, a draft, and a plan for images of so many tokens."""
    device = HostDevice()
    target, draft = (
        Model(ToyBackbone(device), toy_head(IMAGE_CHAIN, draft=draft, share=0.4, z_dim=DIM)) for draft in (False, True)
    )
    plan = Plan(
        mode="exact",
        schedule=raster_schedule(tokens),
        random_order=False,
        prefill=0,
        draft_length=tokens,
        evaluate=None,
        draft="toy",
        tau=1.0,
        guidance=1.0,
        guidance_schedule="constant",
        emit_mean=False,
    )
    return Session(plan, Steps(device, target=target, draft=draft, evaluate=None, aligned=False))


def self_session(chain: Chain, steps: int) -> Session:
    """A target that drafts on so many steps of its chain, and a plan for images of one token."""
    device = HostDevice()
    target = Model(ToyBackbone(device), toy_head(chain, draft=False, z_dim=DIM))
    grid = choose_draft_steps(chain, steps)
    plan = replace(toy_session(1).plan, draft=None, evaluate=grid, grid=grid, emit_mean=True)
    return Session(plan, Steps(device, target=target, draft=None, evaluate=grid, aligned=False, grid=grid))


class TableNoise:
    """As `noise.Draws`, drawn beforehand for all images."""

    def __init__(self, seed: int, images: int, tokens: int) -> None:
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
