"""The profiles that a recipe writes itself, checked against the bundle's graphs."""

from specdec_rt.build.recipe import Recipe, RecipeGraph, ShapeRange
from specdec_rt.manifest import Binding, GraphName

__all__ = ["SizeRange", "overridden_sizes"]

SizeRange = tuple[int, int, int]
"""Of one size: the smallest, the one that the engine is tuned for, the largest."""


def overridden_sizes(
    recipe: Recipe, graph: RecipeGraph, inputs: tuple[Binding, ...], derived: dict[str, SizeRange]
) -> dict[str, SizeRange]:
    """The symbolic sizes of a graph that the recipe's profiles set, in place of the `derived` ones.

    Raises RecipeError where they do not fit the graph.
    """
    found: dict[str, SizeRange] = {}
    set_by: dict[str, str] = {}
    by_name = {binding.name: binding for binding in inputs}
    for name, shapes in recipe.profiles.get(graph, {}).items():
        key = f"profiles.{graph}.{name}"
        if name not in by_name:
            raise recipe.error(f"{key}: unknown input {name!r} of {graph}; expected one of {', '.join(by_name)}")
        for size, sizes in _paired(recipe, key, by_name[name], shapes):
            if isinstance(size, int):
                _check_fixed(recipe, key, f"a size of {size}", size, sizes)
                continue
            if found.setdefault(size, sizes) != sizes:
                raise recipe.error(
                    f"{key} gives size {size} as {_shown(sizes)} (min, opt, max), but {set_by[size]} gives "
                    f"{_shown(found[size])}; expected the same in both: it is enough to name one of them"
                )
            set_by.setdefault(size, name)
            _check_symbolic(recipe, graph, key, size, sizes, derived[size])
    return found


def _paired(recipe: Recipe, key: str, binding: Binding, shapes: ShapeRange) -> list[tuple[int | str, SizeRange]]:
    """Each dimension of the input, and the range that the recipe gives it."""
    if len(shapes.min) != len(binding.shape):
        raise recipe.error(
            f"{key} has {len(shapes.min)} sizes; expected {len(binding.shape)}, as the input is {_shown(binding.shape)}"
        )
    return list(zip(binding.shape, zip(shapes.min, shapes.opt, shapes.max, strict=True), strict=True))


def _check_fixed(recipe: Recipe, key: str, what: str, fixed: int, sizes: SizeRange) -> None:
    for kind, given in zip(("min", "opt", "max"), sizes, strict=True):
        if given != fixed:
            raise recipe.error(f"{key}.{kind} has {given} where the bundle's graph has {what}; put {fixed}")


def _check_symbolic(
    recipe: Recipe, graph: RecipeGraph, key: str, size: str, sizes: SizeRange, derived: SizeRange
) -> None:
    """Sizes that no request can change have to stay within the range."""
    least, _, most = derived
    if least == most:
        _check_fixed(recipe, key, f"size {size} = {most}", most, sizes)
    # A chain is embedded in one call, but any number of its steps is judged; a cache holds at least the image's tokens.
    steps = (least, most) if graph == GraphName.PATH_MEANS else (most,)
    for needed in {"n": steps, "n_plus_1": steps, "S": (least,)}.get(size, ()):
        if not sizes[0] <= needed <= sizes[2]:
            raise recipe.error(
                f"{key}.{'min' if needed < sizes[0] else 'max'}: size {size} runs from {sizes[0]} to {sizes[2]}, "
                f"which leaves out {needed}, a size that this bundle needs"
            )


def _shown(sizes: tuple[int | str, ...]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"
