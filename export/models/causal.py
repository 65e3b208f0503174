"""A causal raster-order transformer over continuous tokens: the digits pair's backbone."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.models.head import DiffusionHead

__all__ = ["CausalBackbone", "CausalBackboneSize", "CausalModel"]


@dataclass(frozen=True, kw_only=True)
class CausalBackboneSize:
    """The sizes of a backbone's weights."""

    tokens: int
    """L"""
    token_dim: int
    """D"""
    classes: int
    """labels are 0 … classes - 1; one more, the dropped label, means that there is no label"""
    width: int
    depth: int
    heads: int


class Attention(nn.Module):
    """Causal self-attention over whole sequences; in the exported graph it works on caches (`export.graphs`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, N, W]` to query, key, value, each `[B, H, N, Dh]`."""
        batch, length, _ = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return query, key, value

    def merge(self, attended: Tensor) -> Tensor:
        """`[B, H, N, Dh]` to `[B, N, W]`."""
        return self.proj(attended.transpose(1, 2).flatten(2))

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden)
        return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class CausalBackbone(nn.Module):
    """`(tokens [B, L, D], label [B]) -> z [B, L, Z]`; z[:, i] depends on the label and the tokens before i.

    The first input is the label's embedding, and input i > 0 is token i - 1. Learned position embeddings are added
    before the first block, and others after the last norm. With `adapter_dim` a linear layer maps the trunk's width
    to another model's Z: such a draft drives the target's head.
    """

    def __init__(self, size: CausalBackboneSize, *, adapter_dim: int | None = None) -> None:
        super().__init__()
        self.size = size
        width = size.width
        self.token_embed = nn.Linear(size.token_dim, width)
        self.label_embed = nn.Embedding(size.classes + 1, width)
        self.position_in = nn.Parameter(torch.randn(size.tokens, width) * 0.02)
        self.position_out = nn.Parameter(torch.randn(size.tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width)
        self.adapter = nn.Linear(width, adapter_dim) if adapter_dim is not None else nn.Identity()
        self.z_dim = width if adapter_dim is None else adapter_dim
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def layers(self) -> list[Block]:
        """The transformer blocks."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def trunk(self, tokens: Tensor, label: Tensor) -> Tensor:
        """The features before the adapter, `[B, L, W]`."""
        hidden = torch.cat([self.label_embed(label)[:, None], self.token_embed(tokens[:, :-1])], dim=1)
        hidden = hidden + self.position_in
        for block in self.layers():
            hidden = block(hidden)
        return self.norm(hidden) + self.position_out

    def forward(self, tokens: Tensor, label: Tensor) -> Tensor:
        return self.adapter(self.trunk(tokens, label))


class CausalModel(nn.Module):
    """A backbone and the head that it drives."""

    def __init__(self, backbone: CausalBackbone, head: DiffusionHead) -> None:
        super().__init__()
        assert backbone.z_dim == head.z_dim
        self.backbone = backbone
        self.head = head
