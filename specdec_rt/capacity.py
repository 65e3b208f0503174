"""What fits one call of a graph: decoding cuts its calls by it, and engines are built for it."""

from dataclasses import dataclass

__all__ = ["BRANCHES", "Capacity"]

BRANCHES = 2
"""Guidance branches of a call at most (G): with a label and without one."""
ALIGNED_VALUES = 64
"""float32 values between the addresses that engines accept as the beginning of a buffer (256 bytes)."""


@dataclass(frozen=True)
class Capacity:
    """What one call of a graph is given at most."""

    states_per_call: int = 2**14
    """states of paths, counted in every guidance branch: activations take some 70 bytes × the head's width for each"""
    modulation_values: int = 2**26
    """float32 values of modulation made at a time (256 MiB)"""
    pixels_per_call: int = 2**19
    """what a decoder is given at a time (8 images of 256 x 256): its activations take some 2 kB for each"""

    def modulation_pairs(self, width: int) -> int:
        """Pairs of a row and a step whose modulation, of `width` values, fits one call in every guidance branch."""
        return self.modulation_values // (BRANCHES * width)

    def modulation_steps(self, rows: int, width: int, steps: int) -> int:
        """For how many of a chain's `steps` the modulation of all rows, of `width` values, is made at a time."""
        if rows * width % ALIGNED_VALUES:
            return 1  # the modulation of a second step would begin where engines accept no buffer
        return min(max(self.modulation_values // (BRANCHES * rows * width), 1), steps)

    def paths_per_call(self, branches: int, width: int, steps: int) -> int:
        """How many paths of so many steps are judged at a time, with modulation of `width` values."""
        states = self.states_per_call // (branches * steps)
        modulated = self.modulation_values // (BRANCHES * steps * width)
        return max(min(states, modulated), 1)

    def images_per_decode(self, pixels: int) -> int:
        """How many images of so many pixels a decoder is given at a time."""
        return max(self.pixels_per_call // pixels, 1)
