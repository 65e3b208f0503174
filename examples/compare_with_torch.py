"""Compare the runtime with PyTorch on the same weights: the same tokens to rounding, and the time of each.

python -m examples.compare_with_torch [IMAGES]

Run it in a clone's root folder, after `pip install -e ".[export]"`. PyTorch decodes here as public code does it, with a
cache of keys and values; `python -m benchmarks run digits` measures several ways more carefully.
"""

import sys
import time

import numpy as np
import torch

import specdec_rt
from benchmarks.torch_baselines.build import build_baseline
from benchmarks.torch_baselines.noise import RuntimeNoise

SEED = 5


def main(images: int) -> None:
    pipeline = specdec_rt.load("digits")
    labels = np.arange(images) % 10
    baseline = build_baseline(pipeline.bundle, "cached")  # reads the weights out of the bundle
    noise = RuntimeNoise(SEED)  # the random numbers that the runtime would draw

    # The first request of each makes what later ones use again: it is not timed.
    baseline.generate(torch.from_numpy(labels), RuntimeNoise(0))
    started = time.perf_counter()
    by_torch = baseline.generate(torch.from_numpy(labels), noise).numpy()
    print(f"PyTorch eager       {time.perf_counter() - started:.2f} s")

    for mode in ("target", "exact"):
        pipeline.generate(labels, seed=0, mode=mode)
        result = pipeline.generate(labels, seed=SEED, mode=mode)
        print(f"specdec-rt, {mode}  {result.stats.seconds:.2f} s")
        if mode == "target":  # in mode exact a token uses its noise for the draft's chain: other tokens, equally likely
            difference = np.abs(result.tokens - by_torch).max()
            print(f"largest difference of a token's value from PyTorch's: {difference:.1e}")
            assert difference < 1e-3


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
