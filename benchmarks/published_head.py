"""A bundle's target with its head as published: a denoising step makes shift, scale and gate of the condition itself.

`python -m benchmarks.published_head BUNDLE OUT`; nothing is written where OUT holds just that already.

That is what an export of the model's own forward pass computes, in the runtime's graphs: `modulation` hands on the
condition alone, W values a row, and every step multiplies with all of the head's weights. A row of the ablation, for
`target` mode; distribution and noise are the bundle's own.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from benchmarks.derived import made_of, told
from export.bundles import require_replaceable
from export.causal import read_pair, write_bundle
from export.mar_models import read_mar_pair, write_mar_bundle
from export.models.head import DiffusionHead
from specdec_rt.bundle import file_sha256, load_bundle
from specdec_rt.config import SELF_DRAFT
from specdec_rt.errors import UsageError
from specdec_rt.manifest import MANIFEST

__all__ = ["PublishedHead", "main", "published_head"]

PROVENANCE = "published_head"
"""Key of the manifest's provenance that says what such a bundle was made of."""


class PublishedHead(DiffusionHead):
    """A head whose modulation is made inside of each step."""

    @property
    def modulation_width(self) -> int:
        """M = W."""
        return self.width

    def modulation(self, condition: Tensor) -> Tensor:
        """The condition `[..., W]`."""
        return condition

    def modulated(self, state: Tensor, modulation: Tensor) -> Tensor:
        """`forward`, which makes of the condition what it needs."""
        return self.forward(state, modulation)


def published_head(source: str | Path, out: Path) -> bool:
    """Write the target of the bundle (a folder, or an embedded one's name) to `out`; whether that had to be done.

    Raises UsageError where `out` is the bundle itself, OutputError where it holds something else or cannot be written.
    """
    bundle = load_bundle(source)
    if out.resolve() == bundle.folder.resolve():
        raise UsageError(f"{out} is the bundle itself; expected another folder to write to")
    require_replaceable(out)
    note = {"source_manifest": file_sha256(bundle.folder / MANIFEST)}
    if made_of(out, PROVENANCE) == note:
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    of_source = bundle.manifest
    defaults = of_source.defaults.model_copy(update={"mode": "target", "draft": SELF_DRAFT})
    provenance = {**of_source.provenance, PROVENANCE: note}
    # The values are those that the bundle holds, in single precision whatever they were rounded to.
    if of_source.family == "mar":
        mar = read_mar_pair(bundle.folder)
        _publish(mar.target.head)
        mar = replace(mar, drafts={}, defaults=defaults, provenance=provenance)
        write_mar_bundle(mar, out, precision="fp32")
    else:
        causal = read_pair(bundle.folder)
        _publish(causal.target.head)
        causal = replace(causal, drafts={}, defaults=defaults, provenance=provenance)
        write_bundle(causal, out, precision="fp32")
    return True


def _publish(head: DiffusionHead) -> None:
    head.__class__ = PublishedHead  # the same parameters under the same names


def main(argv: Sequence[str] | None = None) -> int:
    """As the module says; 0, or the exit code of what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_head", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", help="an embedded bundle's name, or a folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new bundle's folder")
    given = parser.parse_args(argv)
    return told(lambda: published_head(given.bundle, given.out), given.out)


if __name__ == "__main__":
    sys.exit(main())
