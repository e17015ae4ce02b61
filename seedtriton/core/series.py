"""Formulas over a series of numbers: root of the mean, effective sample size, t, its quantiles, plateaus."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import ConfigurationError

# Fewer gains than this have no autocorrelation worth the name.
MIN_GAIN_SAMPLES = 8
# Norms this close to the largest of the window lie on a plateau: a clipped norm is max_norm to within 1e-6 over
# what it was before, and rounding.
PLATEAU_TOLERANCE = 1e-4
# Fewer samples than this can lie close together by chance.
MIN_PLATEAU_SAMPLES = 8


def root_mean(values: Sequence[float]) -> float:
    """``sqrt(mean(values))`` for sums of squares up to the end of fp64; 0.0 for none.

    Raises:
        ConfigurationError: a value that is negative, NaN or infinite.
    """
    for value in values:
        if not 0.0 <= value < math.inf:
            raise ConfigurationError(f"a sum of squares cannot be negative, NaN or infinite, got {value}")
    largest = max(values, default=0.0)
    if largest == 0.0:
        return 0.0
    # The plain sum of two values of 1e308 is infinite; an even power of two scales without rounding.
    exponent = math.frexp(largest)[1] // 2 * 2
    mean = math.fsum(math.ldexp(value, -exponent) for value in values) / len(values)
    return math.ldexp(math.sqrt(mean), exponent // 2)


def effective_sample_size(values: Sequence[float]) -> float:
    """How many independent samples a series is worth, in [1, n]: ``n / (1 + 2 * sum of autocorrelations)``.

    Autocorrelations are summed in pairs of lags while the pair is positive (initial positive sequence;
    Geyer, "Practical Markov Chain Monte Carlo", Statistical Science 7, 1992).
    """
    n = len(values)
    if n == 0:
        return 0.0
    mean = math.fsum(values) / n
    centred = [value - mean for value in values]
    variance = math.fsum(value * value for value in centred)
    if variance == 0.0:
        return float(n)

    def autocorrelation(lag: int) -> float:
        return math.fsum(a * b for a, b in zip(centred, centred[lag:])) / variance

    inflation = -1.0
    for lag in range(0, n - 1, 2):
        pair = autocorrelation(lag) + autocorrelation(lag + 1)
        if pair <= 0.0:
            break
        inflation += 2.0 * pair
    return min(float(n), max(1.0, n / max(inflation, 1e-12)))


def t_statistic(values: Sequence[float]) -> tuple[float | None, float]:
    """Mean over its standard error, corrected for autocorrelation, and the effective sample size.

    None when there are fewer than ``MIN_GAIN_SAMPLES`` values, or when they are all the same: a mean
    without a spread has no standard error. All-zero values are t = 0: nothing was gained.
    """
    n = len(values)
    if n < MIN_GAIN_SAMPLES:
        return None, float(n)
    # The statistic has no unit, so the scale goes first: squares of 1e200 would be infinite.
    largest = max(abs(value) for value in values)
    if largest == 0.0:
        return 0.0, float(n)
    scaled = [value / largest for value in values]
    mean = math.fsum(scaled) / n
    variance = math.fsum((value - mean) * (value - mean) for value in scaled) / (n - 1)
    effective = effective_sample_size(scaled)
    if variance == 0.0:
        return None, effective
    return mean / math.sqrt(variance / effective), effective


def plateau_share(sumsqs: Sequence[float]) -> float | None:
    """Share of the norms that lie within a relative ``PLATEAU_TOLERANCE`` of the largest; None: too few to tell.

    Clipping a group by its own norm cuts every larger one down to ``max_norm``, so its norms pile up at their
    maximum; norms of other batches, or of other weights, do not. 0.0 when all are zero, and when all are the same to
    the last bit: that is one gradient again and again (the whole data in every batch, and nothing that feeds it
    moves), while clipped norms differ in their last bits.

    What it cannot see: clipping by *value*, of which norms tell nothing; and clipping of gradients that are bf16 or
    fp16 themselves, whose norms torch rounds to their dtype, so that they scatter by more than the tolerance.

    Args:
        sumsqs: sums of squares of one group, one per sample, finite.
    """
    if len(sumsqs) < MIN_PLATEAU_SAMPLES:
        return None
    top = max(sumsqs)
    if min(sumsqs) == top:
        return 0.0
    floor = top * (1.0 - PLATEAU_TOLERANCE) ** 2
    return sum(value >= floor for value in sumsqs) / len(sumsqs)


def student(z: float, degrees: int) -> float:
    """The quantile of Student's t where a normal one is ``z``: what z standard errors are when these are uncertain.

    Cornish-Fisher expansion to the fourth order (Abramowitz and Stegun, 26.7.5): within 3 % from 3 degrees of freedom
    on for z up to 3; too small, by a half, for one.

    Raises:
        ConfigurationError: fewer degrees than 1.
    """
    if degrees < 1:
        raise ConfigurationError(f"Student's t needs at least 1 degree of freedom, got {degrees}")
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**order for order, term in enumerate(terms, start=1))
