"""Every graph of a bundle, and what it belongs to."""

from dataclasses import dataclass

from specdec_rt.build.recipe import DECODER, RecipeGraph
from specdec_rt.manifest import Graph, GraphName, Manifest, Model

__all__ = ["BundleGraph", "bundle_graphs"]


@dataclass(frozen=True)
class BundleGraph:
    """A graph of a bundle, and what it belongs to."""

    owner: str
    """ "target", a draft's name, or "decoder" """
    model: Model | None
    """None for the decoder"""
    name: GraphName | None
    """None for the decoder"""
    graph: Graph

    @property
    def label(self) -> str:
        """As in "target.backbone"."""
        return self.owner if self.name is None else f"{self.owner}.{self.name}"

    @property
    def recipe_graph(self) -> RecipeGraph:
        """What recipes call it."""
        return self.name or DECODER


def bundle_graphs(manifest: Manifest) -> list[BundleGraph]:
    """The target's graphs, the drafts', the decoder."""
    models = {"target": manifest.target, **manifest.drafts}
    graphs = [
        BundleGraph(owner, model, name, graph)
        for owner, model in models.items()
        for name, graph in model.graphs.items()
    ]
    if manifest.decoder is not None:
        graphs.append(BundleGraph(DECODER, None, None, manifest.decoder.graph))
    return graphs
