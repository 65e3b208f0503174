"""The torch side: models, checkpoints, ONNX export, parity, and the training of the shipped pair."""
