"""The target's means at the states of drafted paths, as calls on static buffers: all transitions of a path at once."""

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.decode.chain_plan import ChainArrays, FullChains, StridedChains
from specdec_rt.decode.head import Head
from specdec_rt.types import Array

__all__ = ["PathMeans", "own_path_means"]


class PathMeans:
    """Fills `mean [R, n, D]` with a head's means along `arrays.path`, so many rows at a time as one call takes."""

    def __init__(self, head: Head, z: Array, arrays: ChainArrays, mean: Array) -> None:
        self.parts: list[tuple[slice, Array]] = []
        """rows, and `[G r]`: which rows of `z [conditions, Z]` are their conditions"""
        self.calls: list[BoundCall] = []
        branches, n = len(arrays.guidance), head.chain.length
        size = head.capacity.paths_per_call(branches, head.modulation_width, n)
        size -= size % next(unit for unit in (64, 16, 4, 1) if unit <= size)  # each part begins aligned
        for first in range(0, len(mean), size):
            part = slice(first, min(first + size, len(mean)))
            self._judge(head, z, arrays.pick(part), mean[part], part)

    def _judge(self, head: Head, z: Array, arrays: ChainArrays, mean: Array, part: slice) -> None:
        device, (branches, rows), n = head.device, arrays.guidance.shape, head.chain.length
        conditions = device.zeros((branches, rows, head.z_dim), np.float32)
        guidance = device.zeros((branches, rows), np.float32)
        z_row = device.zeros((branches * rows,), np.int64)
        modulation = head.modulation_buffer(branches, rows, n)
        steps, modulate = head.modulate(conditions, modulation)
        steps[:] = np.repeat(np.arange(n), rows)
        device.upload(steps)()
        inputs = {"path": arrays.path, "modulation": modulation, "guidance": guidance, "coefficients": head.coefficients}
        self.parts.append((part, z_row))
        self.calls += [
            device.gather(conditions.reshape(len(z_row), -1), z, z_row),
            device.copy(guidance, arrays.guidance),
            modulate,
            head.path_means(inputs, mean),
        ]


def own_path_means(head: Head, chains: FullChains | StridedChains, arrays: ChainArrays, mean: Array) -> list[BoundCall]:
    """Fills `mean [R, n, D]` where the head itself drew the paths, as a draft on a subset of its steps.

    At the steps that it evaluated its means are the draft's; the others are evaluated in one call, on the modulation
    that the draft has made.
    """
    device, (rows, n, dim), left_out = head.device, mean.shape, chains.left_out
    calls = [device.copy(mean, arrays.mean)]
    if not len(left_out):
        return calls
    assert chains.left_out_modulation is not None
    states = device.zeros((rows, len(left_out) + 1, dim), np.float32)  # the graph wants the state after the last, too
    found = device.zeros((rows, len(left_out), dim), np.float32)
    guidance = device.zeros(arrays.guidance.shape, np.float32)
    row = np.arange(rows)[:, None]
    state_row = head.constant((row * (n + 1) + np.append(left_out, n)).ravel())
    mean_row = head.constant((row * n + left_out).ravel())
    inputs = {
        "path": states,
        "modulation": chains.left_out_modulation,
        "guidance": guidance,
        "coefficients": head.constant(head.chain.coefficients[-n:][left_out].astype(np.float32)),
    }
    return [
        *calls,
        device.gather(states.reshape(-1, dim), arrays.path.reshape(-1, dim), state_row),
        device.copy(guidance, arrays.guidance),
        head.path_means(inputs, found),
        device.scatter(mean.reshape(-1, dim), found.reshape(-1, dim), mean_row),
    ]
