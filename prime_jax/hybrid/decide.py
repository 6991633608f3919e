"""Whether a move stays: a one-sided paired test on control batches that had no part in choosing it."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

import jax


def upper_bound(candidate: Sequence[float], other: Sequence[float], level: float) -> float:
    """Upper bound of the mean paired difference, `mean + t s / sqrt(n)`; below 0 is an improvement.

    Args:
        candidate: Losses of the candidate, one per control batch.
        other: Those of what it has to beat, on the same batches.
        level: Of the one-sided bound, such as 0.95.

    Returns:
        Infinity where a loss is no finite number.
    """
    if not all(map(math.isfinite, [*candidate, *other])):
        return math.inf
    differences = [a - b for a, b in zip(candidate, other, strict=True)]
    n = len(differences)
    return fmean(differences) + student_t(level, n - 1) * stdev(differences) / math.sqrt(n)


def student_t(level: float, freedom: int) -> float:
    """Quantile of Student's t from the normal one (Abramowitz & Stegun 26.7.5); to 2% from 3 degrees on."""
    z = NormalDist().inv_cdf(level)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def mean(losses: Sequence[float]) -> float:
    """Mean, infinite where one of them is no finite number."""
    found = fmean(losses)
    return found if math.isfinite(found) else math.inf


def rows_of(batch: Any) -> int:
    """Examples in a batch: the longest leading axis of its arrays; 1 where there is none."""
    return max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)), default=1)
