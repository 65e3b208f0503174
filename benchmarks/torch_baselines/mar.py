"""MAR in PyTorch, like its public `sample_tokens`: both halves of the doubled batch through encoder and decoder.

The encoder sees the known tokens alone (a boolean gather), the decoder all positions; attention is torch's fused one,
as in the published models' blocks.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.torch_baselines.clock import Parts
from benchmarks.torch_baselines.head import HeadSampler
from benchmarks.torch_baselines.noise import Noise
from export.models.mar import Block, Mar
from specdec_rt.ar_schedule import ArSchedule
from specdec_rt.types import FloatArray

__all__ = ["MarBaseline"]


class MarBaseline:
    """The target alone, set by set. With `first` it ends after so many AR steps; the other tokens stay zero."""

    def __init__(
        self,
        model: Mar,
        sampler: HeadSampler,
        schedule: ArSchedule,
        scale: FloatArray | None,
        *,
        compiled: bool,
        first: int | None,
        parts: Parts,
    ) -> None:
        self._model, self._sampler, self._schedule = model, sampler, schedule
        self._scale = scale
        """`[S]` guidance of each AR step; None where there is none"""
        self._steps = schedule.steps if first is None else min(first, schedule.steps)
        self.parts = parts
        # The encoder's length grows from step to step: torch takes it for a variable once it has seen two.
        self._encode = torch.compile(_encode_known) if compiled else _encode_known
        self._decode = torch.compile(_decode) if compiled else _decode

    @torch.inference_mode()
    def generate(self, labels: Tensor, noise: Noise) -> Tensor:
        """Tokens to show, `[B, L, D]`."""
        size, images = self._model.size, len(labels)
        order = noise.order(images, size.tokens)
        tokens = torch.zeros(images, size.tokens, size.token_dim)
        shown = torch.zeros_like(tokens)
        mask = torch.ones(images, size.tokens, dtype=torch.bool)
        for step in range(self._steps):
            known = int(self._schedule.known[step + 1])
            mask_next = mask.scatter(1, order[:, :known], torch.zeros_like(order[:, :known], dtype=torch.bool))
            predicted = mask ^ mask_next
            with self.parts.backbone:
                z = self._condition(tokens, mask, labels)
                z = z[predicted if self._scale is None else torch.cat([predicted, predicted])]
            with self.parts.head:
                image, position = predicted.nonzero(as_tuple=True)
                normals = noise.chain(image, position, self._sampler.length, size.token_dim)
                guidance = None if self._scale is None else float(self._scale[step])
                tokens[predicted], mean = self._sampler.sample(z, guidance, normals)
            shown[predicted] = mean if self._sampler.emit_mean else tokens[predicted]
            mask = mask_next
        return shown

    def _condition(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """`[B, L, Z]`, or doubled `[2B, L, Z]`."""
        model = self._model
        embedding = model.class_emb(labels)
        if self._scale is not None:
            tokens, mask = torch.cat([tokens, tokens]), torch.cat([mask, mask])
            embedding = torch.cat([embedding, model.fake_latent.expand(len(labels), -1)])
        buffer = model.size.buffer
        visible = torch.cat([torch.ones(len(mask), buffer, dtype=torch.bool), ~mask], dim=1)
        known = model.z_proj(tokens)
        rows = torch.cat([embedding[:, None].expand(-1, buffer, -1), known], dim=1) + model.encoder_pos_embed_learned
        rows = model.z_proj_ln(rows)[visible].reshape(len(mask), -1, known.shape[2])
        encoded = self._encode(model, rows)
        padded = model.mask_token.repeat(len(mask), visible.shape[1], 1)
        padded[visible] = encoded.flatten(0, 1)
        return self._decode(model, padded)


def _encode_known(model: Mar, rows: Tensor) -> Tensor:
    for block in model.encoder_blocks:
        assert isinstance(block, Block)
        rows = _block(block, rows)
    encoded: Tensor = model.decoder_embed(model.encoder_norm(rows))
    return encoded


def _decode(model: Mar, padded: Tensor) -> Tensor:
    rows = padded + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        assert isinstance(block, Block)
        rows = _block(block, rows)
    z: Tensor = model.decoder_norm(rows)[:, model.size.buffer :] + model.diffusion_pos_embed_learned
    return z


def _block(block: Block, hidden: Tensor) -> Tensor:
    query, key, value = block.attn.split(block.norm1(hidden))
    hidden = hidden + block.attn.merge(scaled_dot_product_attention(query, key, value))
    updated: Tensor = hidden + block.mlp(block.norm2(hidden))
    return updated
