"""A bundle's target with its head as published: each denoising step makes shift, scale and gate from the condition.

`python -m benchmarks.published_head BUNDLE OUT` writes it, unless OUT holds just that already.

A plain export of the model's forward pass computes the same. Here it is put into the runtime's graphs: `modulation`
only passes on the condition, W values per row, and every denoising step multiplies with all of the head's weights. It
is a row of the ablation, for mode `target`; distribution and noise are those of the bundle.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from benchmarks.derived import made_of, run_writer
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
    """A head whose modulation is made inside each denoising step."""

    @property
    def modulation_width(self) -> int:
        """M, which is W here."""
        return self.width

    def modulation(self, condition: Tensor) -> Tensor:
        """The condition `[..., W]`."""
        return condition

    def modulated(self, state: Tensor, modulation: Tensor) -> Tensor:
        """The whole forward pass: it makes modulation from the condition."""
        return self.forward(state, modulation)


def published_head(source: str | Path, out: Path) -> bool:
    """Write the target of the bundle (a folder, or an embedded one's name) to `out`. Returns whether it had to.

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
    # The bundle's own weights, in single precision whatever they were rounded to.
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
    """Write the bundle. Returns 0, or the exit code of what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_head", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", help="the name of an embedded bundle, or a bundle's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the new bundle")
    given = parser.parse_args(argv)
    return run_writer(lambda: published_head(given.bundle, given.out), given.out)


if __name__ == "__main__":
    sys.exit(main())
