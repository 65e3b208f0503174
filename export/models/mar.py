"""MAR: a masked autoencoder over continuous tokens and its diffusion head (arXiv 2406.11838).

Parameter names are those of the published checkpoints.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.models.causal import Attention
from export.models.head import DiffusionHead

__all__ = ["PRESETS", "Mar", "MarBackbone", "MarSize", "visible_set"]

_LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MarSize:
    """The sizes of a model's weights, and how its tokens tile an image."""

    image: int = 256
    """height and width, in pixels"""
    stride: int = 16
    """pixels per latent position along each side (the VAE's)"""
    patch: int = 1
    """latent positions per token along each side"""
    channels: int = 16
    """values in a latent position"""
    classes: int = 1000
    """labels are 0 … classes - 1; one more, the dropped label, means that there is no label"""
    buffer: int = 64
    """sequence positions before the tokens; they carry the label's embedding"""
    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    decoder_width: int
    """Z, unless an adapter changes it"""
    decoder_depth: int
    decoder_heads: int
    head_width: int
    head_depth: int
    learned_variance: bool = True

    @property
    def tokens(self) -> int:
        """L."""
        return (self.image // self.stride // self.patch) ** 2

    @property
    def token_dim(self) -> int:
        """D."""
        return self.channels * self.patch**2


def _published(width: int, depth: int, heads: int, *, head_width: int, head_depth: int) -> MarSize:
    return MarSize(
        encoder_width=width,
        encoder_depth=depth,
        encoder_heads=heads,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads,
        head_width=head_width,
        head_depth=head_depth,
    )


PRESETS: Mapping[str, MarSize] = {
    "mar_base": _published(768, 12, 12, head_width=1024, head_depth=6),
    "mar_large": _published(1024, 16, 16, head_width=1280, head_depth=8),
    "mar_huge": _published(1280, 20, 16, head_width=1536, head_depth=12),
}
"""The published models, by the name that their checkpoints give them."""


def visible_set(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The known positions of each image, as `MarBackbone` takes them, from `mask [B, L]` (1 where unknown).

    Returns `visible [B, K]`, ascending positions padded to the K of the image that knows most, and
    `visible_mask [B, K]`, false where an entry is padding.
    """
    known = mask == 0
    count = known.sum(dim=1)
    index = known.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return index, torch.arange(index.shape[1], device=mask.device) < count[:, None]


class Block(nn.Module):
    """Pre-norm transformer block, as timm's `Block`; attention is bidirectional."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        layers = {"fc1": nn.Linear(width, 4 * width), "act": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden: Tensor, key_bias: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """`hidden [B, N, W]` to `[B, N, W]`; with `queries [B, Q]` only those positions are computed, `[B, Q, W]`.

        `key_bias [B, N]` is added to the attention scores of each key.
        """
        query, key, value = self.attn.split(self.norm1(hidden))  # [B, H, N, Dh]
        if queries is not None:
            hidden = _take(hidden, queries)
            query = _take(query.transpose(1, 2).flatten(2), queries)
            query = query.unflatten(2, (self.attn.heads, -1)).transpose(1, 2)
        hidden = hidden + self.attn.merge(self._attend(query, key, value, key_bias))
        return hidden + self.mlp(self.norm2(hidden))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
        # Written out: fused Attention nodes are not portable between backends.
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if key_bias is not None:
            scores = scores + key_bias[:, None, None]
        return scores.softmax(dim=-1) @ value


class MarBackbone(nn.Module):
    """`(tokens [B, L, D], visible [B, K], visible_mask [B, K], label [B]) -> z [B, L, Z]`.

    `visible` holds the positions of known tokens; entries whose `visible_mask` is false are padding (see
    `visible_set`). Values of other tokens are never read, and z is meaningful at unknown positions only. With
    `query [B, Q]` only those positions are computed, and z is `[B, Q, Z]`. With `adapter_dim` a linear layer maps
    the decoder's width to another model's Z: such a draft drives the target's head.
    """

    def __init__(self, size: MarSize, *, adapter_dim: int | None = None) -> None:
        super().__init__()
        self.size = size
        positions = size.buffer + size.tokens
        self.class_emb = nn.Embedding(size.classes, size.encoder_width)
        self.fake_latent = nn.Parameter(torch.zeros(1, size.encoder_width))
        self.z_proj = nn.Linear(size.token_dim, size.encoder_width)
        self.z_proj_ln = nn.LayerNorm(size.encoder_width, eps=_LAYER_NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, size.encoder_width))
        self.encoder_blocks = nn.ModuleList(
            Block(size.encoder_width, size.encoder_heads) for _ in range(size.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(size.encoder_width, eps=_LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(size.encoder_width, size.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, size.decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(size.decoder_width, size.decoder_heads) for _ in range(size.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(size.decoder_width, eps=_LAYER_NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, size.tokens, size.decoder_width))
        self.adapter = nn.Linear(size.decoder_width, adapter_dim) if adapter_dim is not None else nn.Identity()
        self.z_dim = size.decoder_width if adapter_dim is None else adapter_dim
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name == "class_emb.weight" or "." not in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def trunk(
        self, tokens: Tensor, visible: Tensor, visible_mask: Tensor, label: Tensor, query: Tensor | None = None
    ) -> Tensor:
        """The features before the adapter: `[B, L, W]`, or `[B, Q, W]` with a query."""
        encoded = self._encode(tokens, visible, visible_mask, label)
        return self._decode(encoded, visible, visible_mask, query)

    def forward(
        self, tokens: Tensor, visible: Tensor, visible_mask: Tensor, label: Tensor, query: Tensor | None = None
    ) -> Tensor:
        return self.adapter(self.trunk(tokens, visible, visible_mask, label, query))

    def _embed(self, label: Tensor) -> Tensor:
        """The embedding `[B, W]` of each label, or of "no label"."""
        dropped = (label == self.size.classes)[:, None]
        return torch.where(dropped, self.fake_latent, self.class_emb(label.clamp(max=self.size.classes - 1)))

    def _encode(self, tokens: Tensor, visible: Tensor, visible_mask: Tensor, label: Tensor) -> Tensor:
        """The features of the buffer and of the visible tokens, `[B, buffer + K, W]`."""
        buffer = self.size.buffer
        position = self.encoder_pos_embed_learned
        labelled = self._embed(label)[:, None] + position[:, :buffer]
        known = self.z_proj(_take(tokens, visible)) + F.embedding(visible, position[0, buffer:])
        hidden = self.z_proj_ln(torch.cat([labelled, known], dim=1))
        key_bias = F.pad(torch.where(visible_mask, 0.0, -math.inf), (buffer, 0))
        for block in self.encoder_blocks:
            hidden = block(hidden, key_bias)
        return self.encoder_norm(hidden)

    def _decode(self, encoded: Tensor, visible: Tensor, visible_mask: Tensor, query: Tensor | None) -> Tensor:
        buffer, tokens = self.size.buffer, self.size.tokens
        hidden = self.decoder_embed(encoded)
        batch, _, width = hidden.shape
        # All positions hold the mask token except the visible ones. Padding is written past the end, and dropped.
        index = torch.where(visible_mask, visible, tokens)[..., None].expand(-1, -1, width)
        rows = self.mask_token.expand(batch, tokens + 1, -1).scatter(1, index, hidden[:, buffer:])
        hidden = torch.cat([hidden[:, :buffer], rows[:, :tokens]], dim=1) + self.decoder_pos_embed_learned
        *blocks, last = self.decoder_blocks
        for block in blocks:
            hidden = block(hidden)
        if query is None:
            return self.decoder_norm(last(hidden)[:, buffer:]) + self.diffusion_pos_embed_learned
        # Nothing reads the other positions after the last block.
        hidden = last(hidden, queries=query + buffer)
        return self.decoder_norm(hidden) + F.embedding(query, self.diffusion_pos_embed_learned[0])


class Mar(MarBackbone):
    """A backbone and the head that it drives."""

    def __init__(self, size: MarSize) -> None:
        super().__init__(size)
        head = DiffusionHead(
            size.token_dim, self.z_dim, size.head_width, size.head_depth, learned_variance=size.learned_variance
        )
        self.diffloss = nn.ModuleDict({"net": head})

    @property
    def head(self) -> DiffusionHead:
        """The head; checkpoints call it `diffloss.net`."""
        head = self.diffloss["net"]
        assert isinstance(head, DiffusionHead)
        return head


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """`rows [B, N, W]` at `index [B, K]`: `[B, K, W]`."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
