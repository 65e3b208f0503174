"""The only modules that import an execution library (ONNX Runtime, TensorRT, CUDA)."""

import os

# Releases of ONNX Runtime from 1.29 on report what they run to their maker, unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
