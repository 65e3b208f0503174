"""The decoder of the KL-16 autoencoder that MAR's tokens live in (latent diffusion, arXiv 2112.10752).

Parameter names are those of the published `kl16.ckpt`, whose encoder is not needed here.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["VaeDecoder"]

_LATENT_CHANNELS = 16
_WIDTH = 128
_MULTIPLIERS = (1, 1, 2, 2, 4)
"""of `_WIDTH`, from the finest level to the coarsest"""
_BLOCKS = 3
"""in each level: one more than the encoder has"""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions, each after norm and SiLU, around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden)))
        return self.nin_shortcut(hidden) + self.conv2(F.silu(self.norm2(inner)))


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions of the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        query, key, value = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, h w]
        # Written out: fused Attention nodes are not portable between backends.
        weights = (query.transpose(1, 2) @ key * key.shape[1] ** -0.5).softmax(dim=-1)
        return hidden + self.proj_out((value @ weights.transpose(1, 2)).view_as(hidden))


class Middle(nn.Module):
    """The coarsest level's blocks, with the only attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then the step to the next finer one."""

    def __init__(self, inputs: int, outputs: int, *, finest: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(*(ResidualBlock(outputs if i else inputs, outputs) for i in range(_BLOCKS)))
        self.upsample = nn.Identity() if finest else Upsample(outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.upsample(self.block(hidden))


class Decoder(nn.Module):
    """`[B, 16, h, w]` to `[B, 3, 16 h, 16 w]`."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_WIDTH * multiplier for multiplier in _MULTIPLIERS]
        self.conv_in = nn.Conv2d(_LATENT_CHANNELS, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # Numbered from the finest, which runs last.
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(before, after, finest=level == 0)
            for level, (before, after) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(hidden))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class VaeDecoder(nn.Module):
    """Latents `[B, 16, h, w]` to pixels `[B, 3, 16 h, 16 w]`, nominally -1 … 1, not clipped.

    MAR's tokens are latents times 0.2325: divide before decoding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(_LATENT_CHANNELS, _LATENT_CHANNELS, 1)
        self.decoder = Decoder()

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
