"""Another checkout compared with this one: two processes stay alive and take turns with the same requests.

    git worktree add ../before REVISION
    python -m benchmarks.versus ../before [--bundle digits] [--modes target,exact,self] [--batches 1,16]

What is printed is the median of the ratio of their times and its quartiles. What slows both down does not enter it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["compare"]

MODES: dict[str, dict[str, Any]] = {
    "target": {"mode": "target"},
    "exact": {"mode": "exact"},
    "self": {"mode": "exact", "draft": "self"},
}
SERVE = "--serve"


class Side:
    """A process that answers requests with the package of one checkout. It has embedded bundles of its own."""

    def __init__(self, checkout: Path, bundle: str, threads: int) -> None:
        # The script itself runs, not the module: the other checkout need not have it. With -P its folder, which holds
        # modules of common names, is not where other modules are looked for.
        command = [sys.executable, "-P", str(Path(__file__).resolve()), SERVE, bundle, str(threads)]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )
        self.package = json.loads(self._read())

    def seconds(self, options: dict[str, Any], batch: int, seed: int) -> float:
        """How long one request takes."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([options, batch, seed]) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._read()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise SystemExit("a side ended before it answered; what it said stands above")
        return line


def compare(before: Side, after: Side, options: dict[str, Any], batch: int, repeats: int) -> dict[str, float]:
    """Median times of both, and the quartiles of `after / before`. A first request of each does not count."""
    times: dict[Side, list[float]] = {before: [], after: []}
    for seed in range(repeats + 1):
        for side in (before, after) if seed % 2 else (after, before):
            times[side].append(side.seconds(options, batch, seed))
    ratios = [late / early for early, late in zip(times[before][1:], times[after][1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "before": statistics.median(times[before][1:]),
        "after": statistics.median(times[after][1:]),
        "ratio": middle,
        "low": low,
        "high": high,
    }


def serve(bundle: str, threads: int) -> None:
    """Answer requests, each on a line of its own, until there are no more."""
    import numpy as np

    import specdec_rt

    pipeline = specdec_rt.load(bundle, backend="onnxruntime", threads=threads)
    sys.stdout.write(json.dumps(specdec_rt.__file__) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        options, batch, seed = json.loads(line)
        labels = np.arange(batch) % pipeline.bundle.manifest.classes
        started = time.perf_counter()
        pipeline.generate(labels, seed=seed, batch_size=batch, **options)
        sys.stdout.write(f"{time.perf_counter() - started}\n")
        sys.stdout.flush()


def main() -> None:
    """Compare the two, and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus", description=__doc__)
    parser.add_argument("before", type=Path, help="the other checkout, such as an older one")
    parser.add_argument("--bundle", default="digits", help="an embedded bundle's name (default: %(default)s)")
    parser.add_argument("--modes", default=",".join(MODES), help="modes of requests (default: %(default)s)")
    parser.add_argument("--batches", default="1,16", help="images per request (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="timed requests of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of engines (default: %(default)s)")
    given = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    before, after = (Side(checkout, given.bundle, given.threads) for checkout in (given.before, here))
    if before.package == after.package:
        raise SystemExit(f"both sides are {after.package}; name another checkout")
    sys.stdout.write(
        "| mode | batch | before ms | after ms | after / before | quartiles |\n|---|---|---|---|---|---|\n"
    )
    for batch in (int(size) for size in given.batches.split(",")):
        for mode in given.modes.split(","):
            found = compare(before, after, MODES[mode], batch, given.repeats)
            milliseconds = f"{1e3 * found['before']:.0f} | {1e3 * found['after']:.0f}"
            quartiles = f"{found['low']:.2f} to {found['high']:.2f}"
            sys.stdout.write(f"| {mode} | {batch} | {milliseconds} | {found['ratio']:.2f} | {quartiles} |\n")
            sys.stdout.flush()
    before.close()
    after.close()


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
