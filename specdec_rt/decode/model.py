"""A model as decoding sees it: a backbone that gives conditions, and the head that turns them into tokens."""

from dataclasses import dataclass

from specdec_rt.decode.head import Head
from specdec_rt.families.backbone import Backbone

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """A target or a draft. A draft may drive the target's own head."""

    backbone: Backbone
    """with its caches for the images of one batch"""
    head: Head
