"""Random numbers as they must not be used: controls of tests that have to notice it."""

from specdec_rt.noise import Purpose

__all__ = ["ReusingDraws"]


class ReusingDraws:
    """As the `Draws` that it is made of, but rejected chains go on with the noise that they were drafted with."""

    def __init__(self, draws):
        self._draws = draws

    def normal(self, image, token, purpose, steps, dim, attempt=0):
        """As in `Draws`."""
        if purpose is Purpose.COMPLETION:
            return self._draws.normal(image, token, Purpose.CHAIN, steps + 1, dim)[:, 1:]
        return self._draws.normal(image, token, purpose, steps, dim, attempt)

    def uniform(self, *given):
        """As in `Draws`."""
        return self._draws.uniform(*given)
