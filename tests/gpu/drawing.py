"""The images that are drawn on the GPU and on the CPU, to be compared."""

import numpy as np

SEED = 11
IMAGES = {"digits": 32, "digits-mar": 16}


def draw(pipeline, mode, seed=SEED):
    """`[N, L, D]` the tokens of some images of all classes, in one batch."""
    count = IMAGES[pipeline.bundle.manifest.name]
    return pipeline.generate(np.arange(count) % 10, seed=seed, mode=mode, batch_size=count).tokens
