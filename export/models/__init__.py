"""Models as PyTorch code."""
