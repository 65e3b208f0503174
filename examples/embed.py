"""Use the runtime inside a larger program: one pipeline, several threads, errors that can be mended.

python examples/embed.py
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

import specdec_rt


class Painter:
    """A service's view of the model. Load it once: a pipeline keeps its engines and buffers between requests.

    Requests from several threads are safe. They take turns, since they share the buffers; so ask for many images in one
    request where you can, because one batch is quicker than many single images.
    """

    def __init__(self, bundle: str) -> None:
        self._pipeline = specdec_rt.load(bundle)

    def paint(self, label: int, seed: int) -> np.ndarray:
        """One image, uint8 `[height, width, channels]`; the same seed and label give the same image."""
        images = self._pipeline.generate([label], seed=seed, mode="exact").images
        assert images is not None  # a bundle without a decoder makes tokens only
        return np.asarray(images[0])


def main() -> None:
    try:
        painter = Painter("digits")
    except specdec_rt.BundleError as error:  # missing, damaged or altered files
        raise SystemExit(f"cannot start: {error}") from error

    with ThreadPoolExecutor(3) as pool:
        painted = list(pool.map(painter.paint, [3, 1, 4], [10, 11, 12]))
    print(f"painted {len(painted)} images of {painted[0].shape}")
    again = painter.paint(3, 10)
    print(f"the same request again: {'the same image' if np.array_equal(again, painted[0]) else 'another image'}")

    try:
        painter.paint(12, 0)
    except specdec_rt.UsageError as error:  # a request that the caller can correct: what was given, what was expected
        print(f"refused: {error}")
    except specdec_rt.SpecDecError as error:  # every other error that this package raises on purpose
        print(f"failed: {error}")


if __name__ == "__main__":
    main()
