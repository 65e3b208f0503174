"""What a bundle of any family is made of: torch modules, and the fields of the manifest that describe them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from export.models.head import DiffusionHead
from specdec_rt.chain import ChainSpec
from specdec_rt.manifest import Defaults, Dimensions, Family, ImageLayout, Model

__all__ = ["BundleContents", "DecoderContents", "ModelContents", "parameter_count"]


@dataclass(frozen=True, kw_only=True)
class ModelContents:
    """A target or a draft."""

    record: Model
    """the model's entry in the manifest, without its graphs"""
    modules: Mapping[str, nn.Module]
    """the modules whose weights are stored; a weight's name begins with its module's key"""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """strings to store in the weights file beside the weights"""
    backbone: nn.Module
    """becomes the graph `backbone`"""
    examples: Sequence[Any]
    """arguments on which the backbone is traced, and then compared with its graph"""
    head: DiffusionHead | None
    """becomes the other graphs; None where the model drives the target's head"""


@dataclass(frozen=True, kw_only=True)
class DecoderContents:
    """What turns tokens into pixels."""

    module: nn.Module
    """its weights are stored"""
    graph: nn.Module
    """becomes the graph `decoder`"""


@dataclass(frozen=True, kw_only=True)
class BundleContents:
    """All that a bundle is made of; fields as in `Manifest`."""

    name: str
    family: Family
    tokens: int
    token_dim: int
    classes: int
    image: ImageLayout | None
    chain: ChainSpec
    defaults: Defaults
    target: ModelContents
    drafts: Mapping[str, ModelContents]
    decoder: DecoderContents | None
    provenance: Mapping[str, Any]

    @property
    def dimensions(self) -> Dimensions:
        """The sizes on which the graphs' bindings depend."""
        return Dimensions(
            family=self.family,
            tokens=self.tokens,
            token_dim=self.token_dim,
            learned_variance=self.chain.variance == "learned",
        )


def parameter_count(modules: Mapping[str, nn.Module]) -> int:
    """The number of weights in all of the modules."""
    return sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
