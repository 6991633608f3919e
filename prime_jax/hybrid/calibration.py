"""How good loss predictions were, per horizon: skill, intervals that hold, and a confidence."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

BINS = 10
_FORGET, _RATE, _INSIDE = 0.97, 0.1, 0.6827


class Calibration(NamedTuple):
    """Running figures of H horizons, updated when a prediction's window is observed.

    Attributes:
        log_scale: Factor of the predicted deviation that makes 68% of intervals hold, `[H]`.
        error: Mean squared error, `[H]`.
        persistence: That of "the loss stays", `[H]`.
        trend: That of the linear trend, `[H]`.
        bins: How often the loss fell in each tenth of its predicted distribution, `[H, 10]`.
        inside: How often it fell into the one-sigma interval, `[H]`.
        judged: Predictions judged, `[H]`.
        last: Last error in calibrated deviations, `[H]`.
        confidence: 0 to 1, what a phase decision reads, `[H]`.
    """

    log_scale: Float[Array, " H"]
    error: Float[Array, " H"]
    persistence: Float[Array, " H"]
    trend: Float[Array, " H"]
    bins: Float[Array, "H 10"]
    inside: Float[Array, " H"]
    judged: Float[Array, " H"]
    last: Float[Array, " H"]
    confidence: Float[Array, " H"]


def init_calibration(horizons: int) -> Calibration:
    """Nothing judged yet, so no confidence."""
    zero = jnp.zeros(horizons)
    return Calibration(zero, zero, zero, zero, jnp.zeros((horizons, BINS)), zero, zero, zero, zero)


def skill(calibration: Calibration) -> Float[Array, " H"]:
    """1 - squared error over that of persistence."""
    return 1 - calibration.error / jnp.maximum(calibration.persistence, 1e-12)


def deviation(calibration: Calibration, told: Float[Array, " H"]) -> Float[Array, " H"]:
    """Expected error before calibration: the past one; while that is short, what the dynamics model told."""
    n = calibration.judged
    return jnp.sqrt((n * calibration.error + 4 * told**2) / (n + 4))


def judge(
    old: Calibration, mean: Array, sigma: Array, persistence: Array, trend: Array, loss: Array, due: Array
) -> Calibration:
    """Learn from the window that predictions were made for.

    The factor of the deviation moves by stochastic approximation of the 68% quantile (Gibbs & Candes 2021,
    arXiv 2106.00193), so coverage holds whatever the errors' distribution.

    Args:
        old: Figures so far.
        mean: Predicted for this window, `[H]`.
        sigma: Predicted deviation before calibration, `[H]`.
        persistence: What "the loss stays" said, `[H]`.
        trend: What the linear trend said, `[H]`.
        loss: What came.
        due: Whether there was a prediction, `[H]`.
    """
    width = jnp.maximum(sigma * jnp.exp(old.log_scale), 1e-12)
    off = (loss - mean) / width
    inside = (jnp.abs(off) <= 1).astype(jnp.float32)
    keep = jnp.minimum(_FORGET, old.judged / (old.judged + 1))

    def mixed(before: Array, now: Array) -> Array:
        return keep * before + (1 - keep) * now

    tenth = jnp.clip((0.5 * (1 + jnp.tanh(0.8 * off)) * BINS).astype(jnp.int32), 0, BINS - 1)
    new = old._replace(
        log_scale=jnp.clip(old.log_scale + _RATE * (_INSIDE - inside), -4.0, 4.0),
        error=mixed(old.error, (loss - mean) ** 2),
        persistence=mixed(old.persistence, (loss - persistence) ** 2),
        trend=mixed(old.trend, (loss - trend) ** 2),
        bins=old.bins.at[jnp.arange(len(mean)), tenth].add(1.0),
        inside=old.inside + inside,
        judged=old.judged + 1,
        last=jnp.clip(off, -10.0, 10.0),
    )
    seen = new.judged / (new.judged + 5)
    new = new._replace(confidence=jnp.clip(skill(new), 0.0, 1.0) * seen)
    good = due & jnp.isfinite(off)
    kept = [jnp.where(good[:, None] if a.ndim == 2 else good, a, b) for a, b in zip(new, old, strict=True)]
    return Calibration(*kept)
