"""Student's t distribution, exactly: its quantiles widen an interval whose error was measured on few facts."""

import math

import numpy as np

from fasttrace.memories import remembered

__all__ = ["t_quantile"]

BISECTIONS = 60
"""Halves an angle below pi / 2 to the last bit of a float64."""


@remembered(4096)
def t_quantile(probability: float, degrees: int) -> float:
    """The value that a t-distributed number is below with some probability.

    Args:
        probability: above 1/2 and below 1, such as 0.975 for the upper end of a 95 % interval.
        degrees: of freedom, 1 or more.

    Returns:
        The quantile, right to about 1e-12 of itself; NaN without a degree of freedom.

    Source: M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4: for whole
    degrees of freedom the distribution is a finite sum over powers of the cosine of arctan(t / sqrt(degrees)).
    """
    if degrees < 1:
        return math.nan
    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _within(angle: float, degrees: int) -> float:
    """Probability that a t-distributed number lies within sqrt(degrees) * tan(angle) of 0."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    steps = np.arange(2 + odd, degrees - 1, 2)  # each power's factor is that of the one before, times this
    terms = np.cumprod(np.concatenate([[1.0], (steps - 1) / steps * cosine**2]))
    if not odd:
        return sine * terms.sum()
    return 2 / math.pi * (angle + (sine * cosine * terms.sum() if degrees > 1 else 0))
