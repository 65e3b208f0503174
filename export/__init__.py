"""The torch side: models, checkpoints, ONNX export, parity, and the training of the shipped pair."""

import specdec_rt.backends  # noqa: F401  # before ONNX Runtime is imported, which it keeps from reporting to its maker
