"""Workers of a parallel run (pytest -n) have a core each, so that their libraries' threads do not fight over all."""

import os


def pytest_configure():
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
