"""The only modules that import an execution library (ONNX Runtime, TensorRT, CUDA)."""
