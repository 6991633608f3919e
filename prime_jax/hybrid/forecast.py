"""The loss ahead: a few forecasts, and per horizon the mixture of them that past errors speak for.

Each expert says how far the mean loss of a window to come lies from that of the last one ("the loss stays",
which is the zero of all of them). Their weights are a ridge regression per horizon, learned prequentially
(from predictions whose window was observed since) and drawn towards fixed ones while little is known. So a
trend that does not hold loses its weight, and the forecast falls back to the level of the past.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from prime_jax.hybrid.dynamics import AHEAD

TREND = 12  # windows that a trend is fitted to
EXPERTS = ("mean of 4", "mean of 12", "line", "damped line", "dynamics model")
PRIOR = (0.35, 0.1, 0.0, 0.4, 0.0)
_STRENGTH = 64.0  # squared spreads of evidence that the prior counts for
_FORGET = 0.995
_DAMPING = 0.9


class Mixture(NamedTuple):
    """Normal equations of H horizons over K experts, in units of the spread when a forecast was made.

    Attributes:
        inner: `[H, K, K]`.
        onto: `[H, K]`.
    """

    inner: Float[Array, "H K K"]
    onto: Float[Array, "H K"]


def init_mixture(horizons: int) -> Mixture:
    """Nothing learned: the prior alone."""
    count = len(EXPERTS)
    return Mixture(jnp.zeros((horizons, count, count)), jnp.zeros((horizons, count)))


def experts(means: Float[Array, " M"], centre: Float[Array, " T"]) -> Float[Array, "T K"]:
    """What every expert adds to the last mean, for each window ahead.

    Args:
        means: Mean loss of the windows so far, newest last.
        centre: Deviation from the damped line that the dynamics model expects, in units of `spread`.
    """
    last = means[-1]
    damped = base(means)
    centre = jnp.where(jnp.isfinite(centre), centre, 0.0)  # a broken model says nothing
    flat = jnp.ones(AHEAD)
    told = [
        flat * (jnp.mean(means[-4:]) - last),
        flat * (jnp.mean(means[-TREND:]) - last),
        linear(means) - last,
        damped - last,
        damped + spread(means) * centre - last,
    ]
    return jnp.stack(told, axis=-1)


def weights(mixture: Mixture) -> Float[Array, "H K"]:
    """Of every expert, per horizon."""
    eye = _STRENGTH * jnp.eye(len(EXPERTS))
    wanted = mixture.onto + _STRENGTH * jnp.asarray(PRIOR)
    found: Array = jnp.linalg.solve(mixture.inner + eye, wanted[..., None])[..., 0]
    return found


def mixed(weight: Float[Array, "*H K"], told: Float[Array, "*H K"]) -> Float[Array, "*H"]:
    """The mixture's own deviation from the last mean, never outside of what its experts say."""
    lowest, highest = jnp.minimum(jnp.min(told, -1), 0.0), jnp.maximum(jnp.max(told, -1), 0.0)
    return jnp.clip(jnp.sum(weight * told, axis=-1), lowest, highest)


def learned(
    old: Mixture, told: Float[Array, "H K"], came: Float[Array, " H"], unit: Float[Array, " H"], due: Array
) -> Mixture:
    """The normal equations after the windows that were predicted.

    Args:
        old: Before.
        told: What the experts said.
        came: How far the window's mean was from the last one then.
        unit: The spread then.
        due: Whether there was a prediction, `[H]`.
    """
    x = told / unit[:, None]
    y = jnp.clip(came / unit, -10.0, 10.0)
    x = jnp.clip(x, -10.0, 10.0)
    good = (due & jnp.isfinite(y) & jnp.all(jnp.isfinite(x), axis=-1))[:, None]
    inner = _FORGET * old.inner + x[:, :, None] * x[:, None, :]
    onto = _FORGET * old.onto + x * y[:, None]
    return Mixture(jnp.where(good[..., None], inner, old.inner), jnp.where(good, onto, old.onto))


def gaussians(mean: Float[Array, "E T"], log_variance: Float[Array, "E T"]) -> tuple[Array, Array]:
    """Mean and deviation of the ensemble's mixture of Gaussians."""
    centre = jnp.mean(mean, axis=0)
    return centre, jnp.sqrt(jnp.mean(jnp.exp(log_variance), axis=0) + jnp.var(mean, axis=0))


def _fit(means: Array) -> tuple[Array, Array]:
    at = jnp.arange(TREND, dtype=jnp.float32) - (TREND - 1) / 2
    last = means[-TREND:]
    slope = jnp.sum(at * last) / jnp.sum(at * at)
    return jnp.mean(last) + slope * (TREND - 1) / 2, slope


def linear(means: Array) -> Float[Array, " T"]:
    """The straight line through the last windows, `AHEAD` windows on."""
    level, slope = _fit(means)
    return level + slope * jnp.arange(1, AHEAD + 1)


def base(means: Array) -> Float[Array, " T"]:
    """The line again, its slope less and less believed: what the dynamics model adds to."""
    level, slope = _fit(means)
    return level + slope * jnp.cumsum(_DAMPING ** jnp.arange(1, AHEAD + 1))


def spread(means: Array) -> Float[Array, ""]:
    """How much a window's mean strays from one to the next."""
    return jnp.sqrt(jnp.mean(jnp.diff(means[-2 * TREND :]) ** 2) / 2) + 1e-6
