"""Profiles: the shapes that a graph's engine is built for, derived from the calls that decoding will make."""

from functools import cached_property

import numpy as np

from specdec_rt.ar_schedule import ArSchedule, cosine_schedule, raster_schedule
from specdec_rt.backends.tensorrt_builder import ShapeProfile
from specdec_rt.build.profile_overrides import SizeRange, overridden_sizes
from specdec_rt.build.recipe import DECODER, Recipe, RecipeGraph
from specdec_rt.capacity import BRANCHES, Capacity
from specdec_rt.chain import compile_chain
from specdec_rt.manifest import Binding, GraphName, Manifest, Model

__all__ = ["graph_profile"]


def graph_profile(
    manifest: Manifest,
    model: Model | None,
    graph: GraphName | None,
    recipe: Recipe,
    capacity: Capacity = Capacity(),
) -> dict[str, ShapeProfile]:
    """The profile of every input that has a symbolic size, one that is fixed only when the graph runs.

    `graph` is one of `model`'s; both are None for the bundle's decoder. Where the recipe has a profile of an input,
    its sizes hold for all inputs of the graph that share them. Raises RecipeError, naming the key, where
    the recipe's profiles do not fit the graph.
    """
    name: RecipeGraph = DECODER
    if model is None or graph is None:
        assert manifest.decoder is not None  # the caller has its graph
        inputs = manifest.decoder.graph.inputs
        sizes = _decoder_sizes(manifest, recipe, capacity)
    else:
        inputs, name = model.graphs[graph].inputs, graph
        sizes = _CallSizes(manifest, model, recipe, capacity).of(graph)
    sizes |= overridden_sizes(recipe, name, inputs, sizes)
    return {
        binding.name: _profile(binding, sizes)
        for binding in inputs
        if any(isinstance(size, str) for size in binding.shape)
    }


def _profile(binding: Binding, sizes: dict[str, SizeRange]) -> ShapeProfile:
    ranges = [sizes[size] if isinstance(size, str) else (size, size, size) for size in binding.shape]
    smallest, typical, largest = zip(*ranges, strict=True)
    return ShapeProfile(smallest, typical, largest)


def _decoder_sizes(manifest: Manifest, recipe: Recipe, capacity: Capacity) -> dict[str, SizeRange]:
    assert manifest.image is not None  # the bundle was checked: it has a decoder
    # All images of a request come to the decoder at once, whatever the batch was that made their tokens.
    most = capacity.images_per_decode(manifest.image.height * manifest.image.width)
    return {"B": (1, min(recipe.middle_batch, most), most)}


class _CallSizes:
    """Sizes of the calls that decoding makes to one model's graphs.

    A target's usual call has all AR steps of a round, a draft's has one.
    """

    def __init__(self, manifest: Manifest, model: Model, recipe: Recipe, capacity: Capacity) -> None:
        self._capacity = capacity
        self._family = manifest.family
        self._tokens = manifest.tokens
        self._transitions = compile_chain(manifest.chain).length
        self._width = model.modulation_width or 0
        self._middle_batch, self._largest_batch = recipe.middle_batch, recipe.largest_batch
        self._drafted = min(recipe.draft_length, self._tokens)
        self._usual_steps = self._drafted if model == manifest.target else 1
        schedule = _default_schedule(manifest)
        self._step_tokens = _most_tokens(schedule, 1)
        self._round_tokens = _most_tokens(schedule, self._drafted)

    def of(self, graph: GraphName) -> dict[str, SizeRange]:
        """The range of every symbolic size of a graph."""
        n = self._transitions
        match graph:
            case GraphName.BACKBONE:
                return self._mar_sizes() if self._family == "mar" else self._causal_sizes()
            case GraphName.TIME_EMBEDDING:
                return {"n": (1, n, n)}
            case GraphName.MODULATION:
                return {**self._chain_sizes(), "P": self._pairs()}
            case GraphName.DENOISE_STEP:
                return self._chain_sizes()
            case GraphName.PATH_MEANS:
                most = min(self._most_rows, self._capacity.paths_per_call(1, self._width, n))
                rows = (1, min(self._middle_batch * self._round_tokens, most), most)
                # Fewer than all n: the transitions that a draft on the same head skipped, or the last ones of a chain.
                return {"G": self._branches, "R": rows, "n": (1, n, n), "n_plus_1": (2, n + 1, n + 1)}

    @property
    def _branches(self) -> SizeRange:
        """G: engines serve requests with guidance and without it."""
        return (1, BRANCHES, BRANCHES)

    def _chain_sizes(self) -> dict[str, SizeRange]:
        """Usually a chain's rows are those of one AR step; `paper` mode aligns a whole round at once."""
        n = self._transitions
        usual = min(self._middle_batch * self._step_tokens, self._most_rows)
        return {"G": self._branches, "R": (1, usual, self._most_rows), "n": (n, n, n)}

    def _pairs(self) -> SizeRange:
        """P: some steps of all rows of a chain, or one step where there are many rows; all steps of some paths."""
        n = self._transitions
        most = max(self._capacity.modulation_pairs(self._width), self._most_rows, n)
        return (1, min(n * self._middle_batch * self._step_tokens, most), most)

    @cached_property
    def _most_rows(self) -> int:
        """Tokens of one call: those of a round, each AR step padded to the largest.

        In MAR's family a request may ask for any number of AR steps; few make the widest calls.
        """
        if self._family == "causal":
            return self._largest_batch * self._drafted
        few = range(1, min(4 * self._drafted, self._tokens) + 1)
        widest = max(min(self._drafted, steps) * _most_tokens(cosine_schedule(self._tokens, steps), 1) for steps in few)
        return self._largest_batch * widest

    def _causal_sizes(self) -> dict[str, SizeRange]:
        # A draft that catches up with a prefill is fed all its tokens; caches have room for a round past the end.
        slots = self._tokens + self._drafted - 1
        return {
            "B": (1, BRANCHES * self._middle_batch, BRANCHES * self._largest_batch),
            "N": (1, self._usual_steps, self._tokens),
            "S": (self._tokens, slots, slots),
        }

    def _mar_sizes(self) -> dict[str, SizeRange]:
        # Every AR step of every image is a context of its own.
        usual, most = self._usual_steps * self._middle_batch, self._drafted * self._largest_batch
        return {
            "B": (1, BRANCHES * usual, BRANCHES * most),
            "K": (1, max(self._tokens // 2, 1), self._tokens),
            "Q": (1, self._step_tokens, self._tokens),
        }


def _default_schedule(manifest: Manifest) -> ArSchedule:
    """The AR schedule of a request that asks for none."""
    if manifest.family == "causal":
        return raster_schedule(manifest.tokens)
    return cosine_schedule(manifest.tokens, manifest.defaults.ar_steps)


def _most_tokens(schedule: ArSchedule, steps: int) -> int:
    """Most tokens that so many consecutive AR steps make."""
    known = schedule.known
    steps = min(steps, schedule.steps)
    return int(np.max(known[steps:] - known[:-steps]))
