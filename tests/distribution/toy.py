"""A chain over two small random networks, behind the Engine protocol: decoding runs on it as on real engines."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from specdec_rt.backends.host import HostDevice
from specdec_rt.decode.chain import Head
from specdec_rt.engine import BoundCall
from specdec_rt.schedule import Chain, ChainSpec, compile_chain
from specdec_rt.types import Array, FloatArray

__all__ = ["DIM", "TOY_CHAIN", "toy_head"]

DIM, HIDDEN = 2, 16
TOY_CHAIN = compile_chain(
    ChainSpec(steps=8, t_max=960, drop_last=1, final_std=0.15, variance="large", temperature=1.0, emit="mean")
)


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
    """`modulation`: the time table's one column is the time itself, and all that a condition makes of the head."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            outputs["modulation"][:] = inputs["time_table"][inputs["step"]][:, None]

        return call


@dataclass(frozen=True)
class StepEngine:
    """`denoise_step` of a random net."""

    net: RandomNet

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            step = inputs["step"]
            of_state, of_epsilon, std, _ = inputs["coefficients"][step][..., None].swapaxes(0, 1)
            epsilon = self.net(inputs["state"], inputs["modulation"][:, 0, 0])
            outputs["mean"][:] = of_state * inputs["state"] + of_epsilon * epsilon
            outputs["next_state"][:] = outputs["mean"] + std * inputs["noise"]

        return call


@dataclass(frozen=True)
class DensityEngine:
    """`log_density` of a random net."""

    net: RandomNet

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002
        def call() -> None:
            state = inputs["path"][:, :-1]
            epsilon = self.net(state, inputs["time_table"][:, 0])
            coefficients = inputs["coefficients"]
            outputs["mean"][:] = coefficients[:, :1] * state + coefficients[:, 1:2] * epsilon

        return call


def toy_head(chain: Chain, *, draft: bool) -> Head:
    """The target's head, or a draft's: the same network moved some way towards another one."""
    net = RandomNet.of(0)
    if draft:
        net = net.mixed(RandomNet.of(1), 0.06)
    time_table = (chain.timestep[:, None] / 500 - 1).astype(np.float32)
    engines = ModulationEngine(), StepEngine(net), DensityEngine(net)
    return Head(HostDevice(), *engines, time_table, chain, DIM, z_dim=1, modulation_width=1)
