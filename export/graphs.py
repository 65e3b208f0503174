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
        images, heads = torch.arange(tokens.shape[0]), torch.arange(caches[0].shape[1])
        where = images[:, None, None], heads, place[..., None]  # [B, N, H]
        updated: list[Tensor] = []
        for layer, block in enumerate(model.layers()):
            key, value = caches[2 * layer : 2 * layer + 2]
            attended, key, value = self._attend(block.attn, block.norm1(hidden), where, mask, key, value)
            updated += [key, value]
            hidden = hidden + attended
            hidden = hidden + block.mlp(block.norm2(hidden))
        z = model.adapter(model.norm(hidden) + model.position_out[clipped].flatten(0, 1))
        return z.reshape(*tokens.shape[:2], -1), *updated

    @staticmethod
    def _attend(
        attention: Attention,
        hidden: Tensor,
        where: tuple[Tensor, Tensor, Tensor],
        mask: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, _, width = key_cache.shape
        made = attention.qkv(hidden).reshape(batch, -1, 3 * heads, width)
        query, key, value = made.split(heads, dim=2)  # [B, N, H, Dh]
        # An index for each run of Dh values: ONNX Runtime takes 20 times as long where each value has one.
        key_cache = key_cache.index_put(where, key)
        value_cache = value_cache.index_put(where, value)
        # Written out: fused Attention nodes are not portable between backends.
        scores = query.transpose(1, 2) @ key_cache.transpose(2, 3) * width**-0.5 + mask
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


class ModulationGraph(nn.Module):
    """`modulation`: what the conditions `z [G, R, Z]` make of the head at some steps of each row's chain.

    Rows P of the output are of pair p = P // G, `row[p]` at the step that `time_table` has in place `step[p]`, in
    branch P % G: as the product leaves them, for a reshape of a graph's output would copy it.
    """

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, z: Tensor, row: Tensor, time_table: Tensor, step: Tensor) -> Tensor:
        conditions = self.head.cond_embed(z).index_select(1, row).transpose(0, 1)  # [P, G, W]
        conditions = time_table.index_select(0, step)[:, None] + conditions
        return self.head.modulation(conditions.flatten(0, 1))


class _HeadGraph(nn.Module):
    """A head, given its modulation; the chain decides whether what it says of variances counts."""

    def __init__(self, head: DiffusionHead, *, learned_variance: bool) -> None:
        super().__init__()
        assert head.learned_variance or not learned_variance
        self.head = head
        self.learned_variance = learned_variance

    def _predict(self, state: Tensor, modulation: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor | None]:
        """Guided ε̂ `[..., D]` of `state [..., D]`, and where variances are learned v: MAR takes the first branch's.

        `modulation [..., G, M]`, `guidance [..., G]` (leading sizes may be left out).
        """
        states = state[..., None, :].expand(*modulation.shape[:-1], -1)
        rows = self.head.modulated(states.reshape(-1, state.shape[-1]), modulation.reshape(-1, modulation.shape[-1]))
        prediction = rows.reshape(*modulation.shape[:-1], -1)
        epsilon = (guidance[..., None, :] @ prediction).squeeze(-2)
        if not self.head.learned_variance:
            return epsilon, None
        epsilon = epsilon[..., : state.shape[-1]]
        return epsilon, prediction[..., 0, state.shape[-1] :] if self.learned_variance else None


def _learned_std(std: Tensor, log_std_range: Tensor, share: Tensor) -> Tensor:
    """σ of each value, between its bounds; exactly 0 where the bounds are (the range of 0 is 0)."""
    return std * torch.exp(log_std_range * (share + 1) / 2)


class DenoiseStepGraph(_HeadGraph):
    """`denoise_step`: one transition of each row's chain: the next state, and the mean (and learned std) it is from."""

    def forward(
        self,
        state: Tensor,
        modulation: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        step: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, ...]:
        epsilon, share = self._predict(state, modulation, guidance.transpose(0, 1))
        of_state, of_epsilon, std, log_std_range = coefficients.index_select(0, step).split(1, dim=1)
        mean = of_state * state + of_epsilon * epsilon
        if share is None:
            return mean + std * noise, mean
        std = _learned_std(std, log_std_range, share)
        return mean + std * noise, mean, std


class LogDensityGraph(_HeadGraph):
    """`path_means`: means (and learned stds) of all n transitions out of the states of whole paths, in one batch.

    Modulation is laid out step by step, as chains are drawn: a head that verifies what it drafted makes it once.
    """

    def forward(self, path: Tensor, modulation: Tensor, guidance: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
        state = path[:, :-1].transpose(0, 1)  # [n, R, D]
        epsilon, share = self._predict(state, modulation, guidance.transpose(0, 1))
        of_state, of_epsilon, std, log_std_range = coefficients[:, None].split(1, dim=2)
        mean = (of_state * state + of_epsilon * epsilon).transpose(0, 1)
        if share is None:
            return (mean,)
        return mean, _learned_std(std, log_std_range, share).transpose(0, 1)


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
