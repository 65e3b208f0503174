"""Draw one image of each digit and save them as PNG files.

python examples/draw.py [FOLDER]
"""

import sys
from pathlib import Path

from PIL import Image

import specdec_rt


def main(folder: Path) -> None:
    pipeline = specdec_rt.load("digits")  # an embedded bundle; a folder that `python -m export.…` wrote works as well
    result = pipeline.generate(labels=range(10), seed=7, mode="exact")
    assert result.images is not None  # a bundle without a decoder makes tokens only
    folder.mkdir(parents=True, exist_ok=True)
    for label, image in zip(result.labels, result.images, strict=True):  # uint8 [height, width, channels]
        Image.fromarray(image.squeeze()).resize((112, 112)).save(folder / f"{label}.png")
    stats, tokens = result.stats, len(result.labels) * result.tokens.shape[1]
    print(f"{stats.images} images in {stats.seconds:.2f} s, written to {folder}/")
    print(f"{stats.acceptance_rate:.0%} of the judged draft tokens were accepted")
    print(f"{stats.target_backbone_calls} target backbone calls for {tokens} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "drawn"))
