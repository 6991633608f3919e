"""The temperature of InfoNCE: fixed, annealed over the run, or learned within bounds."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LOWEST, HIGHEST = 0.01, 0.5

Schedule = Literal["fixed", "learned", "annealed"]


def initial(temperature: float) -> Float[Array, ""]:
    """What is trained for a learned temperature: it starts at `temperature` and cannot leave its bounds.

    The temperature is `LOWEST + (HIGHEST - LOWEST) * sigmoid` of it, so that no update, however large, gives
    a temperature of zero or less, and the gradient never vanishes at a bound for good.
    """
    inside = float(np.clip(temperature, LOWEST * 1.01, HIGHEST * 0.99))
    share = (inside - LOWEST) / (HIGHEST - LOWEST)
    return jnp.asarray(np.log(share / (1 - share)), jnp.float32)


def learned(trained: Float[Array, ""]) -> Float[Array, ""]:
    """The temperature that the trained number stands for, between 0.01 and 0.5."""
    return LOWEST + (HIGHEST - LOWEST) * jax.nn.sigmoid(trained)


def annealed(start: float, end: float, progress: Float[Array, ""]) -> Float[Array, ""]:
    """From `start` to `end` on half a cosine as `progress` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
