"""The graphs that engines are made of, as torch modules whose arguments follow the binding contract.

Rows are laid out flat, `[rows, width]`: a linear layer on two dimensions becomes one Gemm, bias included, where
on three it would be a MatMul and an Add.
"""

import math

import torch
from torch import Tensor, nn

from export.models.causal import Attention, CausalBackbone
from export.models.head import DiffusionHead
from export.models.mar import MarBackbone
from export.models.vae import VaeDecoder

__all__ = [
    "CausalBackboneGraph",
    "DecoderGraph",
    "DenoiseStepGraph",
    "LogDensityGraph",
    "MarBackboneGraph",
    "ModulationGraph",
    "TimeEmbeddingGraph",
]

LATENT_SCALE = 0.2325
"""MAR's tokens are the VAE's latents times this."""


class CausalBackboneGraph(nn.Module):
    """`backbone`: N inputs from each image's own position on, over key and value caches of S slots.

    Input i of image b stands at `position[b] + i` and carries the token before that place; at place 0
    the label takes the token's part. Slots after a query's own are masked, so what an abandoned draft
    left there is never read.
    """

    def __init__(self, backbone: CausalBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, position: Tensor, label: Tensor, caches: list[Tensor]) -> tuple[Tensor, ...]:
        model = self.backbone
        slots = caches[0].shape[2]
        place = position[:, None] + torch.arange(tokens.shape[1])  # [B, N]
        clipped = place.clamp(max=model.size.tokens - 1)  # past the end lie only drafts that nobody will read
        embedded = torch.where((place == 0)[..., None], model.label_embed(label)[:, None], model.token_embed(tokens))
        hidden = (embedded + model.position_in[clipped]).flatten(0, 1)  # [B N, W]
        hides = torch.arange(slots) > place[..., None]  # [B, N, S]
        mask = torch.where(hides, -torch.inf, 0.0)[:, None]
        updated: list[Tensor] = []
        for layer, block in enumerate(model.layers()):
            key, value = caches[2 * layer : 2 * layer + 2]
            attended, key, value = self._attend(block.attn, block.norm1(hidden), place, mask, key, value)
            updated += [key, value]
            hidden = hidden + attended
            hidden = hidden + block.mlp(block.norm2(hidden))
        z = model.adapter(model.norm(hidden) + model.position_out[clipped].flatten(0, 1))
        return z.reshape(*tokens.shape[:2], -1), *updated

    @staticmethod
    def _attend(
        attention: Attention, hidden: Tensor, place: Tensor, mask: Tensor, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = (*place.shape, attention.heads, -1)
        query, key, value = (part.reshape(rows).transpose(1, 2) for part in attention.qkv(hidden).chunk(3, dim=-1))
        index = place[:, None, :, None].expand_as(key)
        key_cache = key_cache.scatter(2, index, key)
        value_cache = value_cache.scatter(2, index, value)
        # Written out: fused Attention nodes are not portable between backends.
        scores = query @ key_cache.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
        attended = (scores.softmax(dim=-1) @ value_cache).transpose(1, 2)  # [B, N, H, Dh]
        return attention.proj(attended.reshape(hidden.shape)), key_cache, value_cache


class MarBackboneGraph(nn.Module):
    """`backbone` of the MAR family: z at the queries, from the visible tokens alone."""

    def __init__(self, backbone: MarBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, visible: Tensor, visible_mask: Tensor, label: Tensor, query: Tensor) -> Tensor:
        return self.backbone(tokens, visible, visible_mask, label, query)


class TimeEmbeddingGraph(nn.Module):
    """`time_embedding`: training steps `[n]` to the rows that `time_table` is made of."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, timestep: Tensor) -> Tensor:
        return self.head.time_embed(timestep)


class _HeadGraph(nn.Module):
    """A head; the chain decides whether what it says of variances counts."""

    def __init__(self, head: DiffusionHead, *, learned_variance: bool) -> None:
        super().__init__()
        assert head.learned_variance or not learned_variance
        self.head = head
        self.learned_variance = learned_variance

    def _split(self, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a head gives of every branch: its ε̂, and v where variances are learned."""
        if not self.head.learned_variance:
            return prediction, None
        epsilon, share = prediction.chunk(2, dim=-1)
        return epsilon, share if self.learned_variance else None


def _learned_std(std: Tensor, log_std_range: Tensor, share: Tensor) -> Tensor:
    """σ of each value, between its bounds; exactly 0 where the bounds are (the range of 0 is 0)."""
    return std * torch.exp(log_std_range * (share + 1) / 2)


class ModulationGraph(nn.Module):
    """`modulation`: what the conditions `z [G, R, Z]` make of the head at some steps of each row's chain.

    Output i is row `row[i]`'s at the step that `time_table` has in place `step[i]`, in every branch.
    """

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, z: Tensor, row: Tensor, time_table: Tensor, step: Tensor) -> Tensor:
        conditions = self.head.cond_embed(z)[:, row].transpose(0, 1)  # [P, G, W]
        conditions = time_table[step][:, None] + conditions
        return self.head.modulation(conditions.flatten(0, 1)).reshape(*conditions.shape[:2], -1)


class DenoiseStepGraph(_HeadGraph):
    """`denoise_step`: one transition of each row's chain: the next state, and the mean (and learned std) it is from.

    MAR guides ε̂ and takes v as the first branch gives it.
    """

    def forward(
        self,
        state: Tensor,
        modulation: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        step: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, branches, _ = modulation.shape
        states = state[:, None].expand(-1, branches, -1).flatten(0, 1)  # [R G, D]
        prediction, shares = self._split(self.head.modulated(states, modulation.flatten(0, 1)))
        epsilon = (guidance.transpose(0, 1)[:, None] @ prediction.reshape(rows, branches, -1))[:, 0]
        of_state, of_epsilon, std, log_std_range = coefficients[step].split(1, dim=1)
        mean = of_state * state + of_epsilon * epsilon
        if shares is None:
            return mean + std * noise, mean
        std = _learned_std(std, log_std_range, shares.reshape(rows, branches, -1)[:, 0])
        return mean + std * noise, mean, std


class LogDensityGraph(_HeadGraph):
    """`log_density`: means (and learned stds) of all n transitions out of the states of whole paths, in one batch."""

    def forward(
        self, path: Tensor, z: Tensor, guidance: Tensor, time_table: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        state = path[:, :-1]  # [R, n, D]
        condition = time_table + self.head.cond_embed(z)[:, :, None]  # [G, R, n, W]
        states = state.expand(z.shape[0], -1, -1, -1).flatten(0, 2)
        prediction, shares = self._split(self.head(states, condition.flatten(0, 2)))
        epsilon = (guidance[..., None, None] * prediction.reshape(-1, *state.shape)).sum(0)
        mean = coefficients[:, 0, None] * state + coefficients[:, 1, None] * epsilon
        if shares is None:
            return (mean,)
        return mean, _learned_std(
            coefficients[:, 2, None], coefficients[:, 3, None], shares.reshape(-1, *state.shape)[0]
        )


class DecoderGraph(nn.Module):
    """`decoder`: the tokens `[B, L, D]` of whole images to pixels `[B, H, W, 3]`, nominally -1 … 1, not clipped.

    A token is `patch` × `patch` latent positions, its values channel by channel; tokens stand in raster order.
    """

    def __init__(self, vae: VaeDecoder, *, patch: int) -> None:
        super().__init__()
        self.vae = vae
        self.patch = patch

    def forward(self, tokens: Tensor) -> Tensor:
        side, patch = math.isqrt(tokens.shape[1]), self.patch
        places = tokens.view(-1, side, side, tokens.shape[2] // patch**2, patch, patch)  # [B, h, w, c, p, q]
        latents = places.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, side * patch, side * patch)
        return self.vae(latents / LATENT_SCALE).permute(0, 2, 3, 1)
