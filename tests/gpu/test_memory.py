"""Two hundred rounds of shapes that have been met take no more memory than before, on the GPU or the host."""

import gc
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SEEDS = range(4)
ROUNDS = 200
DEVICE_BYTES = HOST_BYTES = 32 * 2**20
"""What the driver's memory pool, and the host's, may come and go by: less than a fifth of a MiB a round."""


def device_bytes():
    """Memory of the GPU that is in use, by whomever."""
    from cuda.bindings import driver

    status, free, total = driver.cuMemGetInfo()
    assert int(status) == 0
    return total - free


def host_bytes():
    """The process's resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.mark.parametrize("cuda_graph", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_memory_does_not_grow(pipeline, backend, name, cuda_graph, record_property):
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("the memory of a GPU is shared by all workers: run with -n 0")
    found = pipeline(name, backend, cuda_graph=cuda_graph)

    def requests():
        """Some requests, always the same; how many rounds the average image took in all of them."""
        rounds = sum(found.generate([seed, 3, 1, 4], seed=seed, mode="exact").stats.rounds for seed in SEEDS)
        gc.collect()
        found.backend.device.wait()
        return rounds / 4

    for _ in range(2):  # all shapes are met, and met again
        requests()
    before = device_bytes(), host_bytes()
    rounds = 0
    while rounds < ROUNDS:
        rounds += requests()
    grown = device_bytes() - before[0], host_bytes() - before[1]
    record_property("device_bytes_grown", grown[0])
    record_property("host_bytes_grown", grown[1])
    assert grown[0] <= DEVICE_BYTES
    assert grown[1] <= HOST_BYTES
