"""The torch side: models, checkpoints, ONNX export, comparisons with torch, and the training of the shipped pairs."""

import specdec_rt.backends  # noqa: F401  # first: it switches off ONNX Runtime's telemetry before that is imported
