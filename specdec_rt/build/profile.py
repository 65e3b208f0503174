"""Profiles: the sizes that a graph's engine is built for, derived from what the runtime will ask of it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specdec_rt.ar_schedule import ArSchedule, cosine_schedule, raster_schedule
from specdec_rt.build.recipe import Recipe, RecipeGraph, ShapeRange
from specdec_rt.capacity import BRANCHES, Capacity
from specdec_rt.chain import compile_chain
from specdec_rt.manifest import Binding, GraphName, Manifest, Model

__all__ = ["Profile", "graph_profile"]

_Range = tuple[int, int, int]
"""Smallest, tuned for, largest."""


@dataclass(frozen=True)
class Profile:
    """Shapes of one input: the smallest, the one that the engine is tuned for, the largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


def graph_profile(
    manifest: Manifest,
    model: Model | None,
    graph: GraphName | None,
    recipe: Recipe,
    capacity: Capacity = Capacity(),
) -> dict[str, Profile]:
    """Profiles of those inputs of a graph that have sizes fixed only when it runs.

    `graph` is one of `model`'s; both are None for the bundle's decoder. What the recipe says of an input
    stands for all inputs of the graph that share its sizes. Raises RecipeError, naming file and line, where
    the recipe's profiles do not fit the graph.
    """
    if model is None or graph is None:
        assert manifest.decoder is not None  # whoever asks has the graph
        inputs, name = manifest.decoder.graph.inputs, "decoder"
        sizes = _decoder_sizes(manifest, recipe, capacity)
    else:
        inputs, name = model.graphs[graph].inputs, graph.value
        sizes = _Call(manifest, model, recipe, capacity).sizes(graph)
    sizes |= _recipe_sizes(recipe, name, inputs, sizes)
    return {
        binding.name: _profile(binding, sizes)
        for binding in inputs
        if any(isinstance(size, str) for size in binding.shape)
    }


def _profile(binding: Binding, sizes: dict[str, _Range]) -> Profile:
    spans = [sizes[size] if isinstance(size, str) else (size, size, size) for size in binding.shape]
    smallest, typical, largest = zip(*spans, strict=True)
    return Profile(smallest, typical, largest)


# --- what the runtime asks for -----------------------------------------------------------------------


def _decoder_sizes(manifest: Manifest, recipe: Recipe, capacity: Capacity) -> dict[str, _Range]:
    assert manifest.image is not None  # the bundle was checked: it has a decoder
    # All images of a request come to the decoder at once, whatever the batch was that made their tokens.
    most = capacity.images_per_decode(manifest.image.height * manifest.image.width)
    return {"B": (1, min(recipe.middle_batch, most), most)}


class _Call:
    """Sizes of the calls that decoding makes to one model's graphs.

    A target is mostly asked about a round's AR steps at once, a draft about one after the other.
    """

    def __init__(self, manifest: Manifest, model: Model, recipe: Recipe, capacity: Capacity) -> None:
        self._capacity = capacity
        self._family = manifest.family
        self._tokens = manifest.tokens
        self._n = compile_chain(manifest.chain).length
        self._modulation = model.modulation_width or 0
        self._middle, self._most = recipe.middle_batch, recipe.largest_batch
        self._drafted = min(recipe.draft_length, self._tokens)
        self._usual_steps = self._drafted if model == manifest.target else 1
        schedule = _schedule(manifest)
        self._set = _largest_sum(schedule, 1)
        self._block = _largest_sum(schedule, self._drafted)

    def sizes(self, graph: GraphName) -> dict[str, _Range]:
        """By symbol."""
        n = self._n
        branches = (1, BRANCHES, BRANCHES)  # engines serve requests with guidance and without it
        match graph:
            case GraphName.BACKBONE:
                return self._mar_sizes() if self._family == "mar" else self._causal_sizes()
            case GraphName.TIME_EMBEDDING:
                return {"n": (1, n, n)}
            case GraphName.MODULATION:
                # Some steps of all rows of a chain, or one where there are many rows; all steps of some paths.
                most = max(self._capacity.modulation_pairs(self._modulation), self._most_rows, n)
                usual = min(n * self._middle * self._set, most)
                return {
                    "G": branches,
                    "R": (1, self._usual_rows, self._most_rows),
                    "P": (1, usual, most),
                    "n": (n, n, n),
                }
            case GraphName.DENOISE_STEP:
                # Mostly a chain's rows are those of one AR step; `paper` mode aligns a whole round at once.
                return {"G": branches, "R": (1, self._usual_rows, self._most_rows), "n": (n, n, n)}
            case GraphName.PATH_MEANS:
                # As many as are judged where G is 1.
                most = min(self._most_rows, self._capacity.paths_per_call(1, self._modulation, n))
                rows = (1, min(self._middle * self._block, most), most)
                # Those of a chain's steps that a draft on the same head has left out, or the last ones of a chain.
                return {"G": branches, "R": rows, "n": (1, n, n), "n_plus_1": (2, n + 1, n + 1)}

    @property
    def _usual_rows(self) -> int:
        return min(self._middle * self._set, self._most_rows)

    @cached_property
    def _most_rows(self) -> int:
        """Tokens of one call: those of a round, each AR step padded to the largest.

        In MAR's family a request may ask for any number of AR steps; few make the widest calls.
        """
        if self._family == "causal":
            return self._most * self._drafted
        few = range(1, min(4 * self._drafted, self._tokens) + 1)
        widest = max(min(self._drafted, steps) * _largest_sum(cosine_schedule(self._tokens, steps), 1) for steps in few)
        return self._most * widest

    def _causal_sizes(self) -> dict[str, _Range]:
        # A draft that catches up with a prefill is fed all its tokens; caches have room for a round past the end.
        slots = self._tokens + self._drafted - 1
        return {
            "B": (1, BRANCHES * self._middle, BRANCHES * self._most),
            "N": (1, self._usual_steps, self._tokens),
            "S": (self._tokens, slots, slots),
        }

    def _mar_sizes(self) -> dict[str, _Range]:
        # Every AR step of every image is a context of its own.
        usual, most = self._usual_steps * self._middle, self._drafted * self._most
        return {
            "B": (1, BRANCHES * usual, BRANCHES * most),
            "K": (1, max(self._tokens // 2, 1), self._tokens),
            "Q": (1, self._set, self._tokens),
        }


def _schedule(manifest: Manifest) -> ArSchedule:
    """That of a request that says nothing."""
    if manifest.family == "causal":
        return raster_schedule(manifest.tokens)
    return cosine_schedule(manifest.tokens, manifest.defaults.ar_steps)


def _largest_sum(schedule: ArSchedule, steps: int) -> int:
    """Most tokens that so many consecutive AR steps make."""
    known = schedule.known
    steps = min(steps, schedule.steps)
    return int(np.max(known[steps:] - known[:-steps]))


# --- what the recipe says ----------------------------------------------------------------------------


def _recipe_sizes(
    recipe: Recipe, name: str, inputs: tuple[Binding, ...], derived: dict[str, _Range]
) -> dict[str, _Range]:
    """Sizes that the recipe's profiles of the graph give its symbols. Raises RecipeError."""
    overrides = recipe.profiles.get(_graph_key(name), {})
    found: dict[str, _Range] = {}
    owner: dict[str, str] = {}
    by_name = {binding.name: binding for binding in inputs}
    for given, shapes in overrides.items():
        keys = ("profiles", name, given)
        if given not in by_name:
            raise recipe.error(keys, f"unknown input {given!r} of {name}; expected one of {', '.join(by_name)}")
        for size, span in _spans(recipe, keys, by_name[given], shapes):
            if isinstance(size, int):
                _check_fixed(recipe, keys, size, size, span)
                continue
            if found.setdefault(size, span) != span:
                raise recipe.error(
                    keys,
                    f"profiles.{name}.{given} gives size {size} as {_shown(span)} (min, opt, max), but {owner[size]} "
                    f"gives {_shown(found[size])}; expected the same in both: it is enough to name one of them",
                )
            owner.setdefault(size, given)
            _check_symbol(recipe, keys, size, span, derived[size])
    return found


def _graph_key(name: str) -> RecipeGraph:
    key: RecipeGraph = name  # type: ignore[assignment]  # GraphName's values, and "decoder"
    return key


def _spans(
    recipe: Recipe, keys: tuple[str, ...], binding: Binding, shapes: ShapeRange
) -> list[tuple[int | str, _Range]]:
    """Each dimension of the input with the range that the recipe gives it."""
    if len(shapes.min) != len(binding.shape):
        raise recipe.error(
            keys,
            f"{'.'.join(keys)} has {len(shapes.min)} sizes; expected {len(binding.shape)}, as the input is "
            f"{_shown(binding.shape)}",
        )
    return list(zip(binding.shape, zip(shapes.min, shapes.opt, shapes.max, strict=True), strict=True))


def _check_fixed(recipe: Recipe, keys: tuple[str, ...], size: int | str, fixed: int, span: _Range) -> None:
    for kind, given in zip(("min", "opt", "max"), span, strict=True):
        if given != fixed:
            what = f"a size of {fixed}" if isinstance(size, int) else f"size {size} = {fixed}"
            raise recipe.error(
                (*keys, kind), f"{'.'.join(keys)}.{kind} has {given} where the bundle's graph has {what}; put {fixed}"
            )


def _check_symbol(recipe: Recipe, keys: tuple[str, ...], symbol: str, span: _Range, derived: _Range) -> None:
    """Sizes that no request can change have to stay within reach."""
    least, _, most = derived
    if least == most:
        _check_fixed(recipe, keys, symbol, most, span)
    # A chain is embedded in one call, but any number of its steps is judged; a cache holds at least the image's tokens.
    steps = (least, most) if GraphName.PATH_MEANS in keys else (most,)
    needed = {"n": steps, "n_plus_1": steps, "S": (least,)}.get(symbol, ())
    for size in needed:
        if not span[0] <= size <= span[2]:
            kind = "min" if span[0] > size else "max"
            raise recipe.error(
                (*keys, kind),
                f"{'.'.join(keys)}: size {symbol} runs from {span[0]} to {span[2]}, which leaves out {size}, a size "
                "that this bundle needs",
            )


def _shown(sizes: tuple[int | str, ...]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"
