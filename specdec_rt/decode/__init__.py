"""Decoding: what a draft proposes, how the target judges it, and the loop of rounds."""
