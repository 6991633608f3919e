"""LinUCB with full covariance (Li et al. 2010, arXiv 1003.0146) over horizons, 0 among them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Bandit(NamedTuple):
    """Normal equations of one ridge regression per horizon.

    Attributes:
        precision: `[K, F, F]`, starts as the identity.
        reward: Sum of features times rewards, `[K, F]`.
    """

    precision: Float[Array, "K F F"]
    reward: Float[Array, "K F"]


def init_bandit(arms: int, features: int) -> Bandit:
    """A bandit that has seen nothing; one feature more is the constant."""
    eye = jnp.tile(jnp.eye(features + 1), (arms, 1, 1))
    return Bandit(eye, jnp.zeros((arms, features + 1)))


def with_constant(features: Float[Array, " N"]) -> Float[Array, " F"]:
    """Features scaled to length at most 1, and the constant."""
    return jnp.append(features / jnp.maximum(1.0, jnp.linalg.norm(features)), 1.0)


def scores(bandit: Bandit, features: Float[Array, " N"], exploration: float) -> Float[Array, " K"]:
    """Upper confidence bound of each arm; that of arm 0, whose reward is 0 by definition, is 0."""
    x = with_constant(features)
    wanted = jnp.stack([bandit.reward, jnp.broadcast_to(x, bandit.reward.shape)], axis=-1)
    solved = jnp.linalg.solve(bandit.precision, wanted)  # [K, F, 2]
    bound = x @ solved[..., 0].T + exploration * jnp.sqrt(jnp.maximum(x @ solved[..., 1].T, 0.0))
    found: Array = bound.at[0].set(0.0)
    return found


def update(bandit: Bandit, arm: Array | int, features: Float[Array, " N"], reward: Array | float) -> Bandit:
    """Learn the reward that an arm brought where these features were seen."""
    x = with_constant(features)
    return Bandit(
        bandit.precision.at[arm].add(jnp.outer(x, x)), bandit.reward.at[arm].add(jnp.asarray(reward) * x)
    )
