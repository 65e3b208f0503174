"""What is wrong with a recipe, in words: the key by its whole path, what it has, what was expected."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from specdec_rt.backends.base import BackendName

__all__ = ["KnownNames", "explain", "listed", "syntax_error"]

EXPECTED = {
    "string_pattern_mismatch": "a compute capability as in '8.9'",
    "too_short": "at least one number",
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
}
"""By the type of pydantic's error, where its own words are of no use."""


@dataclass(frozen=True)
class KnownNames:
    """The names that a recipe may use."""

    keys: Sequence[str]
    tables: Mapping[str, Sequence[str]]
    """the keys inside of each table"""
    graphs: Sequence[str]


def explain(error: ValidationError, known: KnownNames) -> str:
    """What is wrong; of several problems one, a misspelt key before the one that is missing for it."""
    found = [_explain(problem, known) for problem in error.errors()]
    return min(found, key=lambda said: not said.startswith("unknown"))


def syntax_error(error: Exception) -> str:
    """What `tomllib` said of a file that it cannot read; it names line and column itself."""
    if not isinstance(error, tomllib.TOMLDecodeError):  # too deep, or a number that is too long
        return f"is not TOML that can be read ({error}); see https://toml.io"
    said = str(error)
    return f"is not TOML: {said[:1].lower()}{said[1:]}; see https://toml.io"


def _explain(problem: ErrorDetails, known: KnownNames) -> str:
    keys, message, context = problem["loc"], problem["msg"], problem.get("ctx", {})
    if "[key]" in keys:  # of a dictionary: the graph
        graph = keys[keys.index("[key]") - 1]
        return f"unknown graph {graph!r} in profiles{_choices(graph, known.graphs)}"
    if problem["type"] == "recipe":
        keys = (*keys, context["key"])
    key = ".".join(str(part) for part in keys)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}{_choices(keys[-1], known.tables[str(keys[0])] if keys[1:] else known.keys)}"
        case "missing":
            return f"{key} is missing; add {listed(tuple(BackendName)) if keys == ('backend',) else 'it'}"
        case "value_error":
            return f"{key} {message.removeprefix('Value error, ')}"
        case "recipe":
            return f"{key} {message}"
        case "greater_than_equal":
            expected = f"at least {context['ge']}"
        case "less_than_equal":
            expected = f"at most {context['le']}"
        case other:
            expected = EXPECTED.get(other, message.removeprefix("Input should be "))
    return f"{key} is {_shown(problem['input'])}; expected {expected}"


def _choices(given: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"; expected {listed(known)}" + (f" (did you mean {str(near[0])!r}?)" if near else "")


def listed(names: Sequence[str]) -> str:
    """Names in words, as in "'a', 'b' or 'c'"."""
    quoted = [repr(str(name)) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
