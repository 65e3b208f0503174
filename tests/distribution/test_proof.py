"""The proof of docs/algorithm.md, enumerated: on a chain with few states every path can be counted.

Draft and target are arbitrary, and look at the whole history. No tolerance hides a bias here: the probability of every
path that verification gives is compared with the target's, up to rounding.
"""

import itertools
import math

import numpy as np
import pytest

from specdec_rt.acceptance import running_log_weight

STATES, STEPS = 3, 3
PATHS = list(itertools.product(range(STATES), repeat=STEPS + 1))


def transitions(rng):
    """The distribution of the next state after every history."""
    histories = (path for length in range(1, STEPS + 1) for path in itertools.product(range(STATES), repeat=length))
    return {history: rng.dirichlet(np.ones(STATES)) for history in histories}


RNG = np.random.default_rng(0)
TARGET, DRAFT, START = transitions(RNG), transitions(RNG), RNG.dirichlet(np.ones(STATES))


def probability(model, path):
    return START[path[0]] * math.prod(model[path[:j]][path[j]] for j in range(1, STEPS + 1))


def weights(path):
    """`[n + 1]` exp(w) of a drafted path."""
    ratios = [np.log(TARGET[path[:j]][path[j]] / DRAFT[path[:j]][path[j]]) for j in range(1, STEPS + 1)]
    return np.exp(running_log_weight(np.array([ratios]))[0])


def residual(path, j, weight):
    """`[STATES]` max(0, exp(w) p - q) of the state after the first j transitions."""
    return np.maximum(weight * TARGET[path[: j + 1]] - DRAFT[path[: j + 1]], 0)


def acceptance(path):
    """`[n + 1]` probability that each prefix passes its own test."""
    weight = weights(path)
    mass = np.array([residual(path, j, weight[j]).sum() for j in range(STEPS)])
    inner = [1.0 if w == 1 else s / (s + 1 - w) for s, w in zip(mass, weight[:-1], strict=True)]
    return np.array([*inner, weight[-1]])


def longest(passes):
    """`[n + 1]` probability that each prefix is the longest one that passes."""
    later_fail = np.cumprod((1 - passes)[::-1])[::-1]
    return passes * np.append(later_fail[1:], 1.0)


def first_failure(passes):
    """`[n + 1]` the same where the first failure ends the search."""
    reached = np.cumprod(passes)
    return reached - np.append(reached[1:], 0.0)


def verified(rule):
    """The probability of every path that verification makes, and of a draft being accepted whole."""
    made, whole = dict.fromkeys(PATHS, 0.0), 0.0
    for path in PATHS:
        drafted, weight, chosen = probability(DRAFT, path), weights(path), rule(acceptance(path))
        whole += drafted * chosen[STEPS]
        made[path] += drafted * chosen[STEPS]
        for j in np.flatnonzero(chosen[:STEPS]):
            share = residual(path, j, weight[j])
            share = share / share.sum()
            for rest in itertools.product(range(STATES), repeat=STEPS - j):
                new = (*path[: j + 1], *rest)
                fresh = math.prod(TARGET[new[:k]][new[k]] for k in range(j + 2, STEPS + 1))
                made[new] += drafted * chosen[j] * share[rest[0]] * fresh
    return made, whole


def largest_error(made):
    return max(abs(made[path] - probability(TARGET, path)) for path in PATHS)


def test_the_longest_passing_prefix_gives_the_target():
    assert largest_error(verified(longest)[0]) < 1e-15


def test_stopping_at_the_first_failure_does_not():
    assert largest_error(verified(first_failure)[0]) > 0.01


def test_a_prefix_is_kept_as_often_as_its_weight_says():
    """Lemma 1: P(at least j transitions are kept | path) = exp(w[j]), averaged over what follows the prefix."""
    for j in range(STEPS + 1):
        for prefix in itertools.product(range(STATES), repeat=j + 1):
            paths = [path for path in PATHS if path[: j + 1] == prefix]
            shares = [probability(DRAFT, path) for path in paths]
            kept = np.average([longest(acceptance(path))[j:].sum() for path in paths], weights=shares)
            assert kept == pytest.approx(weights(paths[0])[j])


def test_more_is_accepted_than_transition_by_transition():
    one_by_one = sum(
        probability(DRAFT, path)
        * math.prod(min(1, TARGET[path[:j]][path[j]] / DRAFT[path[:j]][path[j]]) for j in range(1, STEPS + 1))
        for path in PATHS
    )
    assert verified(longest)[1] > 1.2 * one_by_one
