"""The graphs that engines are made of, as torch modules whose arguments follow the binding contract."""

import torch
from torch import Tensor, nn

from export.models.causal import Attention, CausalBackbone
from export.models.head import DiffusionHead

__all__ = ["CausalBackboneGraph", "DenoiseStepGraph", "LogDensityGraph", "TimeEmbeddingGraph"]


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


class TimeEmbeddingGraph(nn.Module):
    """`time_embedding`: training steps `[n]` to the rows that `time_table` is made of."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, timestep: Tensor) -> Tensor:
        return self.head.time_embed(timestep)


class DenoiseStepGraph(nn.Module):
    """`denoise_step`: one transition of each row's chain, to the next state and the mean it is drawn around."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        assert not head.learned_variance
        self.head = head

    def forward(
        self,
        state: Tensor,
        z: Tensor,
        guidance: Tensor,
        time_table: Tensor,
        coefficients: Tensor,
        step: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        condition = time_table[step] + self.head.cond_embed(z)  # [G, R, W]
        prediction = self.head(state.expand(z.shape[0], -1, -1), condition)
        epsilon = (guidance[..., None] * prediction).sum(0)
        of_state, of_epsilon, std, _ = coefficients[step][..., None].unbind(1)  # each [R, 1]
        mean = of_state * state + of_epsilon * epsilon
        return mean + std * noise, mean


class LogDensityGraph(nn.Module):
    """`log_density`: the means of all n transitions out of the states of whole paths, in one batch."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        assert not head.learned_variance
        self.head = head

    def forward(self, path: Tensor, z: Tensor, guidance: Tensor, time_table: Tensor, coefficients: Tensor) -> Tensor:
        state = path[:, :-1]  # [R, n, D]
        condition = time_table + self.head.cond_embed(z)[:, :, None]  # [G, R, n, W]
        prediction = self.head(state.expand(z.shape[0], -1, -1, -1), condition)
        epsilon = (guidance[..., None, None] * prediction).sum(0)
        return coefficients[:, 0, None] * state + coefficients[:, 1, None] * epsilon
