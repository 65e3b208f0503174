"""Continuous speculative decoding for autoregressive image models with continuous tokens, without torch."""

from specdec_rt.config import DecodeOptions
from specdec_rt.errors import BackendError, BundleError, ChainError, OutputError, SpecDecError, UsageError
from specdec_rt.pipeline import Pipeline, Result, load

__all__ = [
    "BackendError",
    "BundleError",
    "ChainError",
    "DecodeOptions",
    "OutputError",
    "Pipeline",
    "Result",
    "SpecDecError",
    "UsageError",
    "__version__",
    "load",
]

__version__ = "0.1.0"
