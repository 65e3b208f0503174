"""The causal family in PyTorch: whole contexts as the public code passes them, or with a cache of keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.torch_baselines.clock import Parts
from benchmarks.torch_baselines.head import HeadSampler
from benchmarks.torch_baselines.noise import Noise
from export.models.causal import CausalBackbone
from specdec_rt.types import FloatArray

__all__ = ["CausalBaseline"]


@dataclass(frozen=True)
class CausalBaseline:
    """The target alone, token by token."""

    backbone: CausalBackbone
    sampler: HeadSampler
    scale: FloatArray | None
    """`[L]` guidance of each token; None where there is none"""
    cached: bool
    """whether keys and values are kept between tokens"""
    compiled: bool
    """whether the cached pass goes through torch.compile, on caches of fixed size"""
    parts: Parts

    @torch.inference_mode()
    def generate(self, labels: Tensor, noise: Noise) -> Tensor:
        """Tokens to show, `[B, L, D]`."""
        size, images = self.backbone.size, len(labels)
        doubled = labels if self.scale is None else torch.cat([labels, torch.full_like(labels, size.classes)])
        tokens = torch.zeros(images, size.tokens, size.token_dim)
        shown = torch.zeros_like(tokens)
        condition = self._cached(doubled) if self.cached else self._whole(doubled)
        for position in range(size.tokens):
            with self.parts.backbone:
                z = condition(tokens, position)
            with self.parts.head:
                at = torch.full((images,), position)
                normals = noise.chain(torch.arange(images), at, self.sampler.length, size.token_dim)
                guidance = None if self.scale is None else float(self.scale[position])
                tokens[:, position], mean = self.sampler.sample(z, guidance, normals)
            shown[:, position] = mean if self.sampler.emit_mean else tokens[:, position]
        return shown

    def _whole(self, labels: Tensor) -> "_WholeContext":
        return _WholeContext(self.backbone, labels)

    def _cached(self, labels: Tensor) -> "_Cached":
        return _Cached(self.backbone, labels, compiled=self.compiled)


@dataclass(frozen=True)
class _WholeContext:
    """Every call passes the label and all tokens so far."""

    backbone: CausalBackbone
    labels: Tensor

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        model = self.backbone
        known = tokens[:, :position].repeat(len(self.labels) // len(tokens), 1, 1)
        hidden = torch.cat([model.label_embed(self.labels)[:, None], model.token_embed(known)], dim=1)
        hidden = hidden + model.position_in[: position + 1]
        for block in model.layers():
            hidden = block(hidden)
        z: Tensor = model.adapter(model.norm(hidden[:, -1]) + model.position_out[position])
        return z


class _Cached:
    """Every call passes one token; keys and values of those before it are kept."""

    def __init__(self, backbone: CausalBackbone, labels: Tensor, *, compiled: bool) -> None:
        self._backbone, self._labels = backbone, labels
        size = backbone.size
        shape = (len(labels), size.heads, size.tokens, size.width // size.heads)
        self._keys = [torch.zeros(shape) for _ in range(size.depth)]
        self._values = [torch.zeros(shape) for _ in range(size.depth)]
        self._compiled = compiled

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        model = self._backbone
        if position == 0:
            hidden = model.label_embed(self._labels)
        else:
            last = tokens[:, position - 1].repeat(len(self._labels) // len(tokens), 1)
            hidden = model.token_embed(last)
        hidden = (hidden + model.position_in[position])[:, None]
        if self._compiled:
            # Fixed sizes, or each position would be compiled for itself.
            sees = torch.arange(model.size.tokens) <= position
            return _masked_pass(model, hidden, self._keys, self._values, torch.tensor([position]), sees)
        for block, keys, values in zip(model.layers(), self._keys, self._values, strict=True):
            query, key, value = block.attn.split(block.norm1(hidden))
            keys[:, :, position], values[:, :, position] = key[:, :, 0], value[:, :, 0]
            attended = scaled_dot_product_attention(query, keys[:, :, : position + 1], values[:, :, : position + 1])
            hidden = hidden + block.attn.merge(attended)
            hidden = hidden + block.mlp(block.norm2(hidden))
        z: Tensor = model.adapter(model.norm(hidden[:, 0]) + model.position_out[position])
        return z


@torch.compile(fullgraph=True, dynamic=False)
def _masked_pass(
    model: CausalBackbone, hidden: Tensor, keys: list[Tensor], values: list[Tensor], position: Tensor, sees: Tensor
) -> Tensor:
    for block, layer_keys, layer_values in zip(model.layers(), keys, values, strict=True):
        query, key, value = block.attn.split(block.norm1(hidden))
        layer_keys.index_copy_(2, position, key)
        layer_values.index_copy_(2, position, value)
        attended = scaled_dot_product_attention(query, layer_keys, layer_values, attn_mask=sees[None])
        hidden = hidden + block.attn.merge(attended)
        hidden = hidden + block.mlp(block.norm2(hidden))
    z: Tensor = model.adapter(model.norm(hidden[:, 0]) + model.position_out[position])
    return z
