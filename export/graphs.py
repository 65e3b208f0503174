"""The graphs of a bundle as torch modules; their arguments and results are the bindings of `specdec_rt.manifest`.

Letters of shapes are those of `specdec_rt.types`; W is the width of a network's hidden rows. Linear layers are
applied to flat rows `[rows, W]`: ONNX then has one Gemm with the bias in it, not a MatMul and an Add.
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
    "MarBackboneGraph",
    "ModulationGraph",
    "PathMeansGraph",
    "TimeEmbeddingGraph",
]

LATENT_SCALE = 0.2325
"""MAR's tokens are the VAE's latents times this."""


class CausalBackboneGraph(nn.Module):
    """`backbone` of the causal family: N inputs of each image, over key and value caches of S slots.

    Input i of image b stands at position `position[b] + i` and carries the token of the position before; the
    input at position 0 carries the label instead. A query sees the cache slots up to its own position, so
    what a dropped draft left in later slots is never read.
    """

    def __init__(self, backbone: CausalBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, position: Tensor, label: Tensor, caches: list[Tensor]) -> tuple[Tensor, ...]:
        """`tokens [B, N, D]`, `position [B]`, `label [B]`, `caches` (keys, values of each layer) `[B, H, S, Dh]`.

        Returns `z [B, N, Z]` and the updated caches.
        """
        model = self.backbone
        slots = caches[0].shape[2]
        positions = position[:, None] + torch.arange(tokens.shape[1])  # [B, N]
        clipped = positions.clamp(max=model.size.tokens - 1)  # inputs past the image's end are never used
        is_first = (positions == 0)[..., None]
        embedded = torch.where(is_first, model.label_embed(label)[:, None], model.token_embed(tokens))
        hidden = (embedded + model.position_in[clipped]).flatten(0, 1)  # [B N, W]
        is_later = torch.arange(slots) > positions[..., None]  # [B, N, S]
        mask = torch.where(is_later, -torch.inf, 0.0)[:, None]
        images, heads = torch.arange(tokens.shape[0]), torch.arange(caches[0].shape[1])
        cache_index = images[:, None, None], heads, positions[..., None]  # [B, N, H] together
        updated: list[Tensor] = []
        for layer, block in enumerate(model.layers()):
            key, value = caches[2 * layer : 2 * layer + 2]
            attended, key, value = self._attend(block.attn, block.norm1(hidden), cache_index, mask, key, value)
            updated += [key, value]
            hidden = hidden + attended
            hidden = hidden + block.mlp(block.norm2(hidden))
        z = model.adapter(model.norm(hidden) + model.position_out[clipped].flatten(0, 1))
        return z.reshape(*tokens.shape[:2], -1), *updated

    @staticmethod
    def _attend(
        attention: Attention,
        hidden: Tensor,
        cache_index: tuple[Tensor, Tensor, Tensor],
        mask: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer's attention: `hidden [B N, W]`, `mask [B, 1, N, S]` added to the scores; updates the caches."""
        batch, heads, _, width = key_cache.shape
        projected = attention.qkv(hidden).reshape(batch, -1, 3 * heads, width)
        query, key, value = projected.split(heads, dim=2)  # [B, N, H, Dh]
        # One index for each run of Dh values: with one for each value, ONNX Runtime takes 20 times as long.
        key_cache = key_cache.index_put(cache_index, key)
        value_cache = value_cache.index_put(cache_index, value)
        # Written out: fused Attention nodes are not portable between backends.
        scores = query.transpose(1, 2) @ key_cache.transpose(2, 3) * width**-0.5 + mask
        attended = (scores.softmax(dim=-1) @ value_cache).transpose(1, 2)  # [B, N, H, Dh]
        return attention.proj(attended.reshape(hidden.shape)), key_cache, value_cache


class MarBackboneGraph(nn.Module):
    """`backbone` of the MAR family: the conditions z at the queried positions, computed from the visible tokens."""

    def __init__(self, backbone: MarBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, visible: Tensor, visible_mask: Tensor, label: Tensor, query: Tensor) -> Tensor:
        """`tokens [B, L, D]`, `visible` and `visible_mask [B, K]`, `label [B]`, `query [B, Q]` to `z [B, Q, Z]`."""
        return self.backbone(tokens, visible, visible_mask, label, query)


class TimeEmbeddingGraph(nn.Module):
    """`time_embedding`: the head's embedding of training steps; one row for each transition of a chain."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, timestep: Tensor) -> Tensor:
        """`timestep [n]` to `time_table [n, W]`."""
        return self.head.time_embed(timestep)


class ModulationGraph(nn.Module):
    """`modulation`: the shifts, scales and gates of the head for P pairs of a row and a transition.

    Pair p is row `row[p]` of z at the transition whose time row is `time_table[step[p]]`. Output row i belongs to
    pair i // G and guidance branch i % G. This order is the one that the matrix product leaves: bringing the
    output into another shape would copy it.
    """

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, z: Tensor, row: Tensor, time_table: Tensor, step: Tensor) -> Tensor:
        """`z [G, R, Z]`, `row [P]`, `time_table [n, W]`, `step [P]` to `modulation [P G, M]`."""
        conditions = self.head.cond_embed(z).index_select(1, row).transpose(0, 1)  # [P, G, W]
        conditions = time_table.index_select(0, step)[:, None] + conditions
        return self.head.modulation(conditions.flatten(0, 1))


class _HeadGraph(nn.Module):
    """A head that gets its modulation as an input.

    A head may predict variances that the chain does not use: `learned_variance` is the chain's choice.
    """

    def __init__(self, head: DiffusionHead, *, learned_variance: bool) -> None:
        super().__init__()
        assert head.learned_variance or not learned_variance
        self.head = head
        self.learned_variance = learned_variance

    def _predict(self, state: Tensor, modulation: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor | None]:
        """The guided noise prediction ε̂ `[..., D]`, and the variance share v `[..., D]` where variances are learned.

        `state [..., D]`, `modulation [..., G, M]`, `guidance [..., G]` (its leading sizes may be left out). v is the
        first branch's alone, as in MAR.
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
    """σ of each value, between its bounds; exactly 0 where both bounds are 0."""
    return std * torch.exp(log_std_range * (share + 1) / 2)


class DenoiseStepGraph(_HeadGraph):
    """`denoise_step`: one transition of each row: its mean, its std where variances are learned, and the next state."""

    def forward(
        self,
        state: Tensor,
        modulation: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        step: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, ...]:
        """`state [R, D]`, `modulation [R, G, M]`, `guidance [G, R]`, `coefficients [n, 4]`, `step [R]`, `noise [R, D]`.

        Returns `next_state`, `mean` and where variances are learned `std`, each `[R, D]`.
        """
        epsilon, share = self._predict(state, modulation, guidance.transpose(0, 1))
        of_state, of_epsilon, std, log_std_range = coefficients.index_select(0, step).split(1, dim=1)
        mean = of_state * state + of_epsilon * epsilon
        if share is None:
            return mean + std * noise, mean
        std = _learned_std(std, log_std_range, share)
        return mean + std * noise, mean, std


class PathMeansGraph(_HeadGraph):
    """`path_means`: the means of all n transitions at the states of given paths, in one batch (and learned stds).

    Modulation is ordered by transition, as drawing a chain orders it: a head that verifies a path which it drafted
    itself uses the same buffer.
    """

    def forward(self, path: Tensor, modulation: Tensor, guidance: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
        """`path [R, n + 1, D]`, `modulation [n, R, G, M]`, `guidance [G, R]`, `coefficients [n, 4]`.

        Returns `mean [R, n, D]` and where variances are learned `std [R, n, D]`.
        """
        state = path[:, :-1].transpose(0, 1)  # [n, R, D]
        epsilon, share = self._predict(state, modulation, guidance.transpose(0, 1))
        of_state, of_epsilon, std, log_std_range = coefficients[:, None].split(1, dim=2)
        mean = (of_state * state + of_epsilon * epsilon).transpose(0, 1)
        if share is None:
            return (mean,)
        return mean, _learned_std(std, log_std_range, share).transpose(0, 1)


class DecoderGraph(nn.Module):
    """`decoder`: the tokens of whole images to their pixels, nominally -1 … 1, not clipped.

    A token covers `patch` × `patch` latent positions, and its values are stored channel by channel. Tokens are in
    raster order.
    """

    def __init__(self, vae: VaeDecoder, *, patch: int) -> None:
        super().__init__()
        self.vae = vae
        self.patch = patch

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens [B, L, D]` to `pixels [B, height, width, 3]`."""
        side, patch = math.isqrt(tokens.shape[1]), self.patch
        grid = tokens.view(-1, side, side, tokens.shape[2] // patch**2, patch, patch)  # [B, h, w, c, p, q]
        latents = grid.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, side * patch, side * patch)
        return self.vae(latents / LATENT_SCALE).permute(0, 2, 3, 1)
