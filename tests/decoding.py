"""Requests to a decoder whose parts a test has exchanged: `Pipeline.generate` makes them of its own."""

from dataclasses import dataclass, fields, replace

import numpy as np

from specdec_rt.decode.batch import Batch
from specdec_rt.decode.decoder import Decoder
from specdec_rt.decode.session import Session
from specdec_rt.decode.stats import Counters
from specdec_rt.types import FloatArray

__all__ = ["Decoded", "decode", "with_session"]


@dataclass(frozen=True)
class Decoded:
    """What a request made."""

    tokens: FloatArray
    """`[B, L, D]` those to show"""
    counters: Counters
    batch: Batch
    """as it was at the end"""


def decode(setup, labels, draws, *, images=None, slots=None):
    """The images with these labels; `images` are their keys (default: 0, 1, …)."""
    counters, images = Counters(), np.arange(len(labels)) if images is None else images
    decoder = Decoder(setup, draws, np.asarray(labels), images, counters, lambda _: None, slots=slots)
    return Decoded(decoder.run(), counters, decoder.batch)


def with_session(setup, kind=Session, **changes):
    """The setup with a session of its own, of some kind and with some fields changed, and a verifier for it."""
    made_with = {field.name: getattr(setup.session, field.name) for field in fields(Session)}
    session = kind(**made_with | changes)
    verifier = None if setup.verifier is None else type(setup.verifier)(session, setup.plan)
    return replace(setup, session=session, verifier=verifier)
