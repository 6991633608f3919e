"""The 64 features of a run: what a predictor of its course may look at."""

import jax.numpy as jnp
from jaxtyping import Array, Float

FEATURES = 64
LOSSES, GRADIENTS = 256, 64
SCALES = (4, 8, 16, 32, 64, 128, 192, 256)
GRADIENT_SCALES = (4, 8, 16, 32, 64)
LAGS = (1, 2, 3, 4, 6, 8)
_SMALL = 1e-8


def features_of(
    losses: Float[Array, " L"],
    gradients: Float[Array, " M"],
    cosines: Float[Array, " 4"],
    lengths: Float[Array, " 4"],
    fit: Float[Array, ""],
    step: Float[Array, ""],
    skill: Float[Array, " 4"],
    error: Float[Array, " 4"],
) -> Float[Array, " F"]:
    """64 numbers of order one.

    Args:
        losses: Of the last 256 steps, newest last.
        gradients: Gradient norms of the last 64 steps, newest last.
        cosines: Of the last move with the shortest and the longest average, the optimizer's direction, and
            the move before it.
        lengths: Of these four trees over the length of the last move.
        fit: Share of the last move that the basis explains.
        step: Real steps so far.
        skill: Of the loss predictions at four horizons.
        error: Last prediction errors there, in calibrated deviations.
    """
    spread = jnp.std(losses[-64:]) + _SMALL
    level = jnp.mean(losses[-32:])
    parts: list[Array] = []
    for width in SCALES:  # 24: how far above the level, how spread, how steep
        part = losses[-width:]
        at = jnp.linspace(-1.0, 1.0, width)
        parts += [
            (jnp.mean(part) - level) / spread,
            jnp.log((jnp.std(part) + _SMALL) / spread),
            jnp.mean(part * at) / jnp.mean(at * at) / spread,
        ]
    usual = jnp.mean(gradients) + _SMALL
    for width in GRADIENT_SCALES:  # 10
        part = gradients[-width:]
        parts += [jnp.log((jnp.mean(part) + _SMALL) / usual), jnp.std(part) / usual]
    centred = losses[-64:] - jnp.mean(losses[-64:])
    for lag in LAGS:  # 6: autocorrelation
        parts.append(jnp.mean(centred[lag:] * centred[:-lag]) / (spread * spread))
    z = centred / spread
    parts += [  # 6: shape of the loss
        jnp.mean(z**3),
        jnp.mean(z**4) / 3 - 1,
        jnp.max(z) / 3,
        jnp.min(z) / 3,
        jnp.mean((jnp.diff(losses[-64:]) < 0).astype(jnp.float32)) - 0.5,
        jnp.log(jnp.abs(level) + _SMALL),
    ]
    parts += [fit, jnp.log1p(step) / 10]  # 2
    parts += [*cosines, *jnp.log(lengths + _SMALL) / 4, *skill, *error]  # 16
    return jnp.clip(jnp.nan_to_num(jnp.stack(parts)), -5.0, 5.0)
