"""The graphs that engines are made of, as torch modules whose arguments follow the binding contract."""

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
        hidden = embedded + model.position_in[clipped]
        hides = torch.arange(slots) > place[..., None]  # [B, N, S]
        mask = torch.where(hides, -torch.inf, 0.0)[:, None]
        updated: list[Tensor] = []
        for layer, block in enumerate(model.layers()):
            key, value = caches[2 * layer : 2 * layer + 2]
            attended, key, value = self._attend(block.attn, block.norm1(hidden), place, mask, key, value)
            updated += [key, value]
            hidden = hidden + attended
            hidden = hidden + block.mlp(block.norm2(hidden))
        z = model.adapter(model.norm(hidden) + model.position_out[clipped])
        return z, *updated

    @staticmethod
    def _attend(
        attention: Attention, hidden: Tensor, place: Tensor, mask: Tensor, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = attention.split(hidden)  # [B, H, N, Dh]
        index = place[:, None, :, None].expand_as(key)
        key_cache = key_cache.scatter(2, index, key)
        value_cache = value_cache.scatter(2, index, value)
        # Written out: fused Attention nodes are not portable between backends.
        scores = query @ key_cache.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
        return attention.merge(scores.softmax(dim=-1) @ value_cache), key_cache, value_cache


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

    def _predict(self, state: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Every branch's ε̂ `[G, ..., D]`, and v `[..., D]` where variances are learned: the first branch's alone.

        `state [G, ..., D]`, `condition [G, ..., W]`. MAR guides ε̂ and takes v as the first branch gives it.
        """
        prediction = self.head(state, condition)
        if not self.head.learned_variance:
            return prediction, None
        epsilon, share = prediction.chunk(2, dim=-1)
        return epsilon, share[0] if self.learned_variance else None


def _learned_std(std: Tensor, log_std_range: Tensor, share: Tensor) -> Tensor:
    """σ of each value, between its bounds; exactly 0 where the bounds are (the range of 0 is 0)."""
    return std * torch.exp(log_std_range * (share + 1) / 2)


class DenoiseStepGraph(_HeadGraph):
    """`denoise_step`: one transition of each row's chain: the next state, and the mean (and learned std) it is from."""

    def forward(
        self,
        state: Tensor,
        z: Tensor,
        guidance: Tensor,
        time_table: Tensor,
        coefficients: Tensor,
        step: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, ...]:
        condition = time_table[step] + self.head.cond_embed(z)  # [G, R, W]
        prediction, share = self._predict(state.expand(z.shape[0], -1, -1), condition)
        epsilon = (guidance[..., None] * prediction).sum(0)
        of_state, of_epsilon, std, log_std_range = coefficients[step][..., None].unbind(1)  # each [R, 1]
        mean = of_state * state + of_epsilon * epsilon
        if share is None:
            return mean + std * noise, mean
        std = _learned_std(std, log_std_range, share)
        return mean + std * noise, mean, std


class LogDensityGraph(_HeadGraph):
    """`log_density`: means (and learned stds) of all n transitions out of the states of whole paths, in one batch."""

    def forward(
        self, path: Tensor, z: Tensor, guidance: Tensor, time_table: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        state = path[:, :-1]  # [R, n, D]
        condition = time_table + self.head.cond_embed(z)[:, :, None]  # [G, R, n, W]
        prediction, share = self._predict(state.expand(z.shape[0], -1, -1, -1), condition)
        epsilon = (guidance[..., None, None] * prediction).sum(0)
        mean = coefficients[:, 0, None] * state + coefficients[:, 1, None] * epsilon
        if share is None:
            return (mean,)
        return mean, _learned_std(coefficients[:, 2, None], coefficients[:, 3, None], share)


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
