"""A bundle's models on a backend: engines, heads, backbones and sessions, made when a request first needs them."""

from dataclasses import replace
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import Backend, Engine, run_once
from specdec_rt.bundle import Bundle
from specdec_rt.chain import Chain, ChainSpec, compile_chain
from specdec_rt.config import Mode
from specdec_rt.decode.head import Head, HeadEngines
from specdec_rt.decode.model import Model
from specdec_rt.decode.session import Session
from specdec_rt.errors import BundleError
from specdec_rt.families.backbone import Backbone
from specdec_rt.families.causal import CausalBackbone
from specdec_rt.families.mar import MarBackbone
from specdec_rt.manifest import Graph, GraphName
from specdec_rt.manifest import Model as ModelRecord
from specdec_rt.plan import Plan, Tuning
from specdec_rt.types import BoolArray

__all__ = ["Models"]

KEPT_CHAINS = 8
"""Chains (a request's temperature makes a new one), and what is made for them, that are kept for the next request."""
StepMask = tuple[bool, ...] | None


class Models:
    """Everything that is made of a bundle and kept. Sessions share models and buffers: one batch at a time."""

    def __init__(self, bundle: Bundle, backend: Backend, tuning: Tuning) -> None:
        self.bundle = bundle
        self.backend = backend
        self._tuning = tuning
        self._engines: dict[str, Engine] = {}
        self._compile_chain = lru_cache(maxsize=KEPT_CHAINS)(compile_chain)
        self._head = lru_cache(maxsize=KEPT_CHAINS)(self._make_head)
        self._backbone = lru_cache(maxsize=KEPT_CHAINS)(self._make_backbone)
        self._session = lru_cache(maxsize=KEPT_CHAINS)(self._make_session)

    def chain(self, temperature: float) -> Chain:
        """The bundle's chain, with every standard deviation times `temperature`."""
        spec = self.bundle.manifest.chain
        return self._compile_chain(replace(spec, temperature=spec.temperature * temperature))

    def session(self, plan: Plan, chain: Chain) -> Session:
        """The session that carries out the plan."""
        branches = 1 if plan.guidance == 1 else 2
        # Only caches make a difference between draft lengths.
        cache_positions = plan.cache_positions if self.bundle.manifest.target.cache else 0
        masks = (_hashable(plan.draft_step_mask), _hashable(plan.resume_step_mask))
        return self._session(plan.mode, plan.draft, chain.spec, branches, cache_positions, *masks)

    def engine(self, record: ModelRecord, name: GraphName) -> Engine:
        """The engine of a model's graph. Raises BackendError, or BundleError where the file has other bindings."""
        return self.graph_engine(record.graphs[name])

    def graph_engine(self, graph: Graph) -> Engine:
        """The engine of any graph of the bundle; raises as `engine` does."""
        path = self.bundle.path(graph)
        if graph.file not in self._engines:
            self._engines[graph.file] = self.backend.load(path)
        engine = self._engines[graph.file]
        declared = ("inputs", engine.inputs, graph.inputs), ("outputs", engine.outputs, graph.outputs)
        for kind, found, wanted in declared:
            if found != {binding.name for binding in wanted}:
                raise BundleError(f"{path} has other {kind} than the manifest says: {sorted(found)}; export it again")
        return engine

    def _make_session(
        self,
        mode: Mode,
        draft: str | None,
        spec: ChainSpec,
        branches: int,
        cache_positions: int,
        draft_step_mask: StepMask,
        resume_step_mask: StepMask,
    ) -> Session:
        return Session(
            device=self.backend.device,
            target=None if mode == "draft" else self._model(None, spec, branches, cache_positions),
            draft=None if draft is None else self._model(draft, spec, branches, cache_positions),
            draft_step_mask=_array(draft_step_mask),
            resume_step_mask=_array(resume_step_mask),
            shared_noise=mode == "paper",
        )

    def _model(self, name: str | None, spec: ChainSpec, branches: int, cache_positions: int) -> Model:
        """The target (None) or a draft."""
        record = self.bundle.manifest.model(name)
        head = self._head(name if record.head == "own" else None, spec)
        return Model(self._backbone(name, branches, cache_positions), head)

    def _make_backbone(self, name: str | None, branches: int, cache_positions: int) -> Backbone:
        manifest, device = self.bundle.manifest, self.backend.device
        record, null_label = manifest.model(name), manifest.classes
        engine = self.engine(record, GraphName.BACKBONE)
        sizes = {"tokens": manifest.tokens, "token_dim": manifest.token_dim, "branches": branches}
        if record.cache is None:
            return MarBackbone(device, engine, record.z_dim, null_label, **sizes)
        return CausalBackbone(
            device, engine, record.cache, record.z_dim, null_label, cache_positions=cache_positions, **sizes
        )

    def _make_head(self, name: str | None, spec: ChainSpec) -> Head:
        record, chain = self.bundle.manifest.model(name), self._compile_chain(spec)
        assert record.head_width is not None  # the bundle was checked: this model has a head
        assert record.modulation_width is not None
        device, embed = self.backend.device, self.engine(record, GraphName.TIME_EMBEDDING)
        tables = run_once(
            device, embed, {"timestep": chain.timestep}, {"time_table": (chain.length, record.head_width)}
        )
        graphs = (GraphName.MODULATION, GraphName.DENOISE_STEP, GraphName.PATH_MEANS)
        return Head(
            device,
            HeadEngines(*(self.engine(record, graph) for graph in graphs)),
            tables["time_table"],
            chain,
            token_dim=self.bundle.manifest.token_dim,
            z_dim=record.z_dim,
            modulation_width=record.modulation_width,
            capacity=self._tuning.capacity,
        )


def _hashable(step_mask: BoolArray | None) -> StepMask:
    return None if step_mask is None else tuple(step_mask.tolist())


def _array(step_mask: StepMask) -> BoolArray | None:
    return None if step_mask is None else np.array(step_mask)
