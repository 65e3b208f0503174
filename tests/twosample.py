"""Two-sample tests that the distribution tests share."""

import numpy as np
from scipy import stats

__all__ = ["grouped_sliced_p_value", "permutation_p_value", "sliced_p_value"]


def sliced_p_value(first, second, *, directions=8, seed=0):
    """p-value of "samples [N, D] and [M, D] come from one distribution".

    Kolmogorov-Smirnov along random directions and along the norm; Bonferroni over them.
    """
    rng = np.random.default_rng(seed)
    axes = rng.normal(size=(first.shape[1], directions))
    slices = [(first @ axis, second @ axis) for axis in axes.T]
    centre = np.concatenate([first, second]).mean(axis=0)
    slices.append((np.linalg.norm(first - centre, axis=1), np.linalg.norm(second - centre, axis=1)))
    return min(1.0, len(slices) * min(stats.ks_2samp(a, b, method="asymp").pvalue for a, b in slices))


def grouped_sliced_p_value(first, second):
    """The same over groups `[K, N, D]`, each compared with its own: Fisher's combination over the groups.

    Each group's Bonferroni p-value is conservative, and so is their combination.
    """
    values = [sliced_p_value(a, b, seed=group) for group, (a, b) in enumerate(zip(first, second, strict=True))]
    return float(stats.combine_pvalues(np.maximum(values, 1e-300), method="fisher").pvalue)


def permutation_p_value(first, second, labels_first, labels_second, *, rounds=999, seed=0):
    """p-value of the energy distance between features `[N, F]` and `[M, F]`, permuted within each label.

    The statistic is summed over labels, so only differences within a class count.
    """
    rng = np.random.default_rng(seed)
    blocks = []
    for label in np.unique(labels_first):
        a, b = first[labels_first == label], second[labels_second == label]
        both = np.concatenate([a, b]).astype(np.float64)
        blocks.append((np.linalg.norm(both[:, None] - both[None], axis=-1), len(a)))

    def statistic(orders):
        total = 0.0
        for (distance, count), order in zip(blocks, orders, strict=True):
            a, b = order[:count], order[count:]
            total += 2 * distance[np.ix_(a, b)].mean() - distance[np.ix_(a, a)].mean() - distance[np.ix_(b, b)].mean()
        return total

    found = statistic([np.arange(len(distance)) for distance, _ in blocks])
    drawn = [statistic([rng.permutation(len(distance)) for distance, _ in blocks]) for _ in range(rounds)]
    return (1 + sum(value >= found for value in drawn)) / (1 + rounds)
