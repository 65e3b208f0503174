"""The diffusion MLP that turns a condition into a token (MAR, arXiv 2406.11838 §3.3).

Parameter names are those of the published checkpoints (`net.*` of their `diffloss`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DiffusionHead"]

_FREQUENCIES = 128
_LAYER_NORM_EPS = 1e-6


class TimestepEmbedder(nn.Module):
    """Training step `[...]` to `[..., width]`: sinusoids, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        exponent = torch.arange(_FREQUENCIES, dtype=torch.float32, device=timestep.device) / _FREQUENCIES
        angle = timestep[..., None].float() * torch.exp(-math.log(10000.0) * exponent)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class ResidualBlock(nn.Module):
    """An MLP block whose norm is shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return self.modulated(hidden, shift, 1 + scale, gate)

    def modulated(self, hidden: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """The block with a given shift, scale and gate, all `[..., W]`; 1 is already added to `scale`."""
        return hidden + gate * self.mlp(self.in_ln(hidden) * scale + shift)


class FinalLayer(nn.Module):
    """A norm that the condition shifts and scales, then the projection to the prediction."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=_LAYER_NORM_EPS)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.modulated(hidden, shift, 1 + scale)

    def modulated(self, hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The layer with a given shift and scale, both `[..., W]`; 1 is already added to `scale`."""
        return self.linear(self.norm_final(hidden) * scale + shift)


class DiffusionHead(nn.Module):
    """Predicts the noise ε̂ in a token's state; with `learned_variance` also v, IDDPM's share between two variances.

    `forward(state [..., D], condition [..., W]) -> [..., D or 2D]`, where `condition` is the sum of
    `time_embed(timestep)` and `cond_embed(z [..., Z])`. They are apart so that callers that evaluate many steps of
    one token compute each of them once.
    """

    def __init__(self, token_dim: int, z_dim: int, width: int, depth: int, *, learned_variance: bool) -> None:
        super().__init__()
        self.token_dim, self.z_dim, self.width, self.depth = token_dim, z_dim, width, depth
        self.learned_variance = learned_variance
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(z_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, token_dim * (2 if learned_variance else 1))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.time_embed.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        # Blocks start as the identity and the prediction as zero (adaLN-Zero, arXiv 2212.09748).
        for block in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, state: Tensor, condition: Tensor) -> Tensor:
        hidden = self.input_proj(state)
        for block in self.res_blocks:
            hidden = block(hidden, condition)
        return self.final_layer(hidden, condition)

    @property
    def modulation_width(self) -> int:
        """M, the number of values in a row of `modulation`."""
        return (3 * self.depth + 2) * self.width

    def modulation(self, condition: Tensor) -> Tensor:
        """`condition [..., W]` to `[..., M]`: shift, scale, gate of each block, then the final layer's shift and scale.

        These layers hold most of a head's weights. As they do not depend on the state, one matrix product computes
        them for a whole chain. 1 is already added to every scale, by way of the bias.
        """
        linears = [layer.adaLN_modulation[1] for layer in (*self.res_blocks, self.final_layer)]
        biases = []
        for linear in linears:
            one = torch.zeros_like(linear.bias)
            one[self.width : 2 * self.width] = 1
            biases.append(linear.bias + one)
        return F.linear(F.silu(condition), torch.cat([linear.weight for linear in linears]), torch.cat(biases))

    def modulated(self, state: Tensor, modulation: Tensor) -> Tensor:
        """`forward` with a given `modulation [..., M]`, which broadcasts with `state [..., D]`."""
        parts = modulation.split(self.width, dim=-1)
        hidden = self.input_proj(state)
        for index, block in enumerate(self.res_blocks):
            assert isinstance(block, ResidualBlock)
            hidden = block.modulated(hidden, *parts[3 * index : 3 * index + 3])
        return self.final_layer.modulated(hidden, *parts[-2:])
