"""The target's means at the states of drafted paths, as calls on static buffers: all transitions of a path at once."""

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.decode.chain_plan import ChainArrays, FullChains, StridedChains
from specdec_rt.decode.head import Head
from specdec_rt.types import Array

__all__ = ["evaluate_left_out", "evaluate_paths"]


def evaluate_paths(head: Head, z: Array, arrays: ChainArrays) -> tuple[list[tuple[slice, Array]], list[BoundCall]]:
    """What fills `arrays.mean [R, n, D]` with a head's means along `arrays.path`, so many rows at a time as fit.

    First come the rows of each part, and `[G r]`: which rows of `z [conditions, Z]` are their conditions.
    """
    size, z_rows, calls = head.paths_per_call(len(arrays.guidance)), [], []
    size -= size % next(unit for unit in (64, 16, 4, 1) if unit <= size)  # each part begins aligned
    for first in range(0, len(arrays.path), size):
        part = slice(first, min(first + size, len(arrays.path)))
        z_row, of_part = _evaluate_part(head, z, arrays.pick(part))
        z_rows.append((part, z_row))
        calls += of_part
    return z_rows, calls


def _evaluate_part(head: Head, z: Array, arrays: ChainArrays) -> tuple[Array, list[BoundCall]]:
    device, (branches, rows), n = head.device, arrays.guidance.shape, head.chain.length
    conditions = device.zeros((branches, rows, head.z_dim), np.float32)
    z_row = device.zeros((branches * rows,), np.int64)
    modulation = head.modulation_buffer(branches, rows, n)
    _, modulate = head.modulate(conditions, modulation, np.arange(n))
    gather = device.gather(conditions.reshape(len(z_row), -1), z, z_row)
    means = head.bind_path_means(arrays.path, modulation, arrays.guidance, head.coefficients, arrays.mean)
    return z_row, [gather, modulate, *means]


def evaluate_left_out(
    head: Head, chains: FullChains | StridedChains, arrays: ChainArrays, mean: Array
) -> list[BoundCall]:
    """What fills `mean [R, n, D]` where the head itself drew the paths, as a draft on a subset of its steps.

    At the steps that it evaluated its means are the draft's; the others are evaluated in one call, on the modulation
    that the draft has made.
    """
    device, (rows, n, dim), left_out = head.device, mean.shape, chains.left_out
    copy = device.copy(mean, arrays.mean)
    if not len(left_out):
        return [copy]
    assert chains.left_out_modulation is not None
    row = np.arange(rows)[:, None]
    # The graph takes one state more than it gives means; that one means nothing here.
    states = device.zeros((rows, len(left_out) + 1, dim), np.float32)
    state_row = head.constant((row * (n + 1) + np.append(left_out, n)).ravel())
    found, mean_row = device.zeros((rows, len(left_out), dim), np.float32), head.constant((row * n + left_out).ravel())
    coefficients = head.constant(head.chain.coefficients[-n:][left_out].astype(np.float32))
    return [
        copy,
        device.gather(states.reshape(-1, dim), arrays.path.reshape(-1, dim), state_row),
        *head.bind_path_means(states, chains.left_out_modulation, arrays.guidance, coefficients, found),
        device.scatter(mean.reshape(-1, dim), found.reshape(-1, dim), mean_row),
    ]
