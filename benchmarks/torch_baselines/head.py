"""The diffusion head step by step, guided by doubling the batch (as the public MAR code's `p_sample_loop` does).

Each step of the published sampler embeds the training step and projects the condition anew for every row, in both
branches. `hoisted` makes each of them once, which the published code does not.
"""

import torch
from torch import Tensor

from export.models.head import DiffusionHead
from specdec_rt.chain import Chain

__all__ = ["HeadSampler"]


class HeadSampler:
    """Runs whole chains of `R` tokens; `compiled` passes the step through torch.compile."""

    def __init__(self, head: DiffusionHead, chain: Chain, *, hoisted: bool = False, compiled: bool = False) -> None:
        self.head = head
        self.length = chain.length
        self.emit_mean = chain.spec.emit == "mean"
        self._hoisted = hoisted
        self._learned = chain.spec.variance == "learned"
        self._timestep = torch.from_numpy(chain.timestep.copy())
        self._coefficients = torch.from_numpy(chain.coefficients).float()  # [n, 4]
        self._step = torch.compile(self._one_step, fullgraph=True) if compiled else self._one_step

    def sample(self, z: Tensor, guidance: float | None, normals: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and the means they were drawn around, `[R, D]`.

        `z [R, Z]`, or with `guidance` (the scale) `[2R, Z]`: the label's conditions, then the dropped label's.
        `normals [R, n + 1, D]`.
        """
        state = mean = normals[:, 0]
        scale = None if guidance is None else torch.tensor(guidance)
        condition = self.head.cond_embed(z) if self._hoisted else None
        table = self.head.time_embed(self._timestep) if self._hoisted else None
        for j in range(self.length):
            if condition is None or table is None:
                timestep = self._timestep[j].expand(len(z))
                state, mean = self._step(state, z, None, timestep, scale, self._coefficients[j], normals[:, j + 1])
            else:
                embedded = condition + table[j]
                state, mean = self._step(state, None, embedded, None, scale, self._coefficients[j], normals[:, j + 1])
        return state, mean

    def _one_step(
        self,
        state: Tensor,
        z: Tensor | None,
        condition: Tensor | None,
        timestep: Tensor | None,
        scale: Tensor | None,
        coefficients: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        head = self.head
        if condition is None:
            condition = head.time_embed(timestep) + head.cond_embed(z)
        output = head(state if scale is None else torch.cat([state, state]), condition)
        epsilon = output[:, : head.token_dim]
        if scale is not None:
            labelled, unlabelled = epsilon.chunk(2)
            epsilon = unlabelled + scale * (labelled - unlabelled)
        of_state, of_epsilon, std, log_std_range = coefficients.unbind()
        mean = of_state * state + of_epsilon * epsilon
        if self._learned:
            std = std * torch.exp(log_std_range * (output[: len(state), head.token_dim :] + 1) / 2)
        return mean + std * noise, mean
