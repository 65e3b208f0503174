"""The head's denoising chain: a spec that stands in a bundle's manifest, and the table of coefficients made of it.

A `ChainSpec` is data (it stands in a bundle's manifest); `compile_chain` turns it into the table of
coefficients that engines and acceptance read. Conventions are those of IDDPM (arXiv 2102.09672) as
MAR (arXiv 2406.11838) uses them: cosine schedule over 1000 training steps, noise prediction.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from specdec_rt.errors import ChainError
from specdec_rt.types import FloatArray, IntArray

__all__ = [
    "TRAINING_STEPS",
    "Chain",
    "ChainSpec",
    "compile_chain",
    "cosine_alpha_bar",
]

TRAINING_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSpec:
    """A chain as a manifest describes it. Raises ChainError where the fields contradict each other."""

    # A manifest with a misspelt field must fail, not fall back to a default: read by pydantic.
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    steps: int
    """T, the training steps spread evenly from 0 to `t_max`."""
    t_max: int = TRAINING_STEPS - 1
    """largest training step used"""
    drop_last: int = 0
    """how many of the least noisy steps are left out"""
    final_std: float = 0.0
    """standard deviation of the last transition, before temperature"""
    variance: Literal["small", "large", "learned"] = "large"
    """which variance the other transitions take (IDDPM §3.1)"""
    temperature: float = 1.0
    """factor on every standard deviation"""
    emit: Literal["sample", "mean"] = "sample"
    """whether the token shown is the chain's last state or the mean it was drawn around"""

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large", "learned"):
            raise ChainError(f"chain.variance is {self.variance!r}; expected 'small', 'large' or 'learned'")
        if self.emit not in ("sample", "mean"):
            raise ChainError(f"chain.emit is {self.emit!r}; expected 'sample' or 'mean'")
        if not 1 <= self.t_max < TRAINING_STEPS:
            raise ChainError(f"chain.t_max is {self.t_max}; expected 1 to {TRAINING_STEPS - 1}")
        if not 2 <= self.steps <= self.t_max + 1:
            raise ChainError(f"chain.steps is {self.steps}; expected 2 to t_max + 1 = {self.t_max + 1}")
        if not 0 <= self.drop_last < self.steps:
            raise ChainError(f"chain.drop_last is {self.drop_last}; expected 0 to steps - 1 = {self.steps - 1}")
        if not (math.isfinite(self.final_std) and self.final_std >= 0):
            raise ChainError(f"chain.final_std is {self.final_std}; expected a number of at least 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ChainError(f"chain.temperature is {self.temperature}; expected a number above 0")


@dataclass(frozen=True, slots=True)
class Chain:
    """A compiled chain of n = T - drop_last transitions, numbered from the noisiest.

    Transition j maps state x to `N(state_coefficient[j] x + epsilon_coefficient[j] ε̂, std²)`, where ε̂ is
    the head's prediction at `timestep[j]`; x̂₀ = prediction_state[j] x + prediction_epsilon[j] ε̂.
    With `variance="learned"` log std runs from log `std[j]` (v = -1) to `log_std_range[j]` more (v = 1).
    """

    spec: ChainSpec
    timestep: IntArray
    """`[n]` training step that the head is told"""
    state_coefficient: FloatArray
    """`[n]`"""
    epsilon_coefficient: FloatArray
    """`[n]`"""
    std: FloatArray
    """`[n]` standard deviation after temperature; the lower bound where it is learned"""
    log_std_range: FloatArray
    """`[n]` zero unless learned"""
    prediction_state: FloatArray
    """`[n]`"""
    prediction_epsilon: FloatArray
    """`[n]`"""
    final_density_std: float
    """std that densities of the last transition use: its own, or the clipped posterior's where that is 0"""

    @property
    def length(self) -> int:
        """n, the number of transitions."""
        return len(self.timestep)

    @property
    def coefficients(self) -> FloatArray:
        """`[n, 4]` float64: what the head engines read, columns state, epsilon, std, log std range."""
        columns = (self.state_coefficient, self.epsilon_coefficient, self.std, self.log_std_range)
        return np.stack(columns, axis=1)

    @property
    def hold_coefficients(self) -> FloatArray:
        """`[n, 5]` float64: a chain on a held x̂₀, columns p, q, std, u, v.

        Transition j on x̂₀ has mean p[j] x + q[j] x̂₀; the prediction that transition j itself made, with mean μ at
        state x, is x̂₀ = u[j] x + v[j] μ. Both follow from the coefficients of ε̂ (see above).
        """
        of_x0 = self.epsilon_coefficient / self.prediction_epsilon
        of_state = self.state_coefficient - of_x0 * self.prediction_state
        x0_of_mean = self.prediction_epsilon / self.epsilon_coefficient
        x0_of_state = self.prediction_state - x0_of_mean * self.state_coefficient
        return np.stack([of_state, of_x0, self.std, x0_of_state, x0_of_mean], axis=1)

    @property
    def epsilon_weight(self) -> FloatArray:
        """`[n]` factor of ‖ε̂_q - ε̂_p‖² in the KL divergence of two paths: b²/(2σ²)."""
        return self.epsilon_coefficient**2 / (2 * self.std**2)

    def refusal(self) -> str | None:
        """Why path densities do not exist or cannot be compared, naming the field; None where they can."""
        spec = self.spec
        if spec.variance == "learned":
            return (
                "mode 'exact' needs equal variances in draft and target, but chain.variance is 'learned'; "
                "export with a fixed-variance chain (for MAR: --chain exact)"
            )
        if spec.t_max == TRAINING_STEPS - 1:
            return (
                f"mode 'exact' cannot work on a chain that starts at chain.t_max = {spec.t_max}: the step out of "
                "pure noise makes acceptance 0; export with t_max of about 975"
            )
        if np.any(self.std <= 0):
            return (
                f"mode 'exact' needs noise in every transition, but chain.final_std is {spec.final_std}; "
                "export with final_std of about 0.1 (or the clipped posterior's, about 0.006)"
            )
        return None

    def require_density_ratio(self) -> None:
        """Raise ChainError where `refusal` gives a reason."""
        refusal = self.refusal()
        if refusal is not None:
            raise ChainError(refusal)


def cosine_alpha_bar() -> FloatArray:
    """`[1000]` float64: the cumulative signal share of the cosine schedule (arXiv 2102.09672 eq. 17)."""
    edges = np.cos((np.arange(TRAINING_STEPS + 1) / TRAINING_STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    alpha_bar: FloatArray = np.cumprod(1 - betas)
    return alpha_bar


def compile_chain(spec: ChainSpec) -> Chain:
    """Respace the cosine schedule to `spec` and tabulate its transitions (float64)."""
    timesteps = _spread(spec.steps, spec.t_max)
    alpha_bar = cosine_alpha_bar()[timesteps]
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    posterior_variance[0] = posterior_variance[1]  # log-clipped, as IDDPM does: the true one is 0

    prediction_state = 1 / np.sqrt(alpha_bar)
    prediction_epsilon = -np.sqrt(1 / alpha_bar - 1)
    from_prediction = beta * np.sqrt(previous) / (1 - alpha_bar)
    from_state = (1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar)
    state_coefficient = from_state + from_prediction * prediction_state
    epsilon_coefficient = from_prediction * prediction_epsilon

    variance = beta if spec.variance == "large" else posterior_variance
    std = np.sqrt(variance)
    log_std_range = np.zeros(spec.steps)
    if spec.variance == "learned":
        log_std_range = 0.5 * (np.log(beta) - np.log(posterior_variance))

    clipped_std = float(np.sqrt(posterior_variance[spec.drop_last]))
    # The last transition jumps from its state straight to the prediction of the clean token.
    last = spec.drop_last
    state_coefficient[last], epsilon_coefficient[last] = prediction_state[last], prediction_epsilon[last]
    std[last], log_std_range[last] = spec.final_std, 0.0

    kept = slice(None, last - 1 if last else None, -1)  # indices steps - 1 … last, noisiest first
    return Chain(
        spec=spec,
        timestep=timesteps[kept].copy(),
        state_coefficient=state_coefficient[kept].copy(),
        epsilon_coefficient=epsilon_coefficient[kept].copy(),
        std=std[kept] * spec.temperature,
        log_std_range=log_std_range[kept].copy(),
        prediction_state=prediction_state[kept].copy(),
        prediction_epsilon=prediction_epsilon[kept].copy(),
        final_density_std=(spec.final_std or clipped_std) * spec.temperature,
    )


def _spread(steps: int, t_max: int) -> IntArray:
    """`[steps]` training steps from 0 to `t_max`: a stride added up and rounded, as IDDPM does.

    Multiplying instead would round some ties the other way.
    """
    stride, at, timesteps = t_max / (steps - 1), 0.0, []
    for _ in range(steps):
        timesteps.append(round(at))
        at += stride
    return np.array(timesteps, np.int64)
