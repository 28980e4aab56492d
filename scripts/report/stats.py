"""Statistics over seeds: intervals, paired tests, and Holm's correction for many of them."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """(mean, half width) of Student's interval of the mean of n independent values; nan for the width of one value."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


def paired_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that the paired values (n,) differ by chance alone: all 2^n flips of the differences' signs.

    Exact up to 16 pairs, and with 65,536 random flips beyond. Fisher, The Design of Experiments (1935), section 21.
    """
    difference = np.subtract(b, a)
    if not difference.any():
        return 1.0
    found = stats.permutation_test(
        (difference,), lambda d, axis: np.mean(d, axis), permutation_type="samples", n_resamples=2**16, vectorized=True,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in their order: Holm, Scand. J. Statist. 6 (1979)."""
    order = np.argsort(p_values)
    steps = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected.tolist()
