"""Correction: a few real gradients on a few coefficients, bounded, from a start that the past suggests.

Coefficients are counted in units: 1 is the whole way to an average, or one window's length along the
optimizer's direction or the last move. `c = shared[P] + 0.3 own[G, P]`: what all groups need is learned from
all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from prime_jax.hybrid.basis import jumped
from prime_jax.hybrid.settings import HybridConfig

_OWN = 0.3
LossFn = Callable[[Any, Any], Array]


class Corrector(NamedTuple):
    """Coefficients on their way.

    Attributes:
        start: Where they began, `[G, P]`.
        learned: What gradients added: `shared [P]` and `own [G, P]`.
        opt_state: Of their optimizer.
    """

    start: Float[Array, "G P"]
    learned: dict[str, Array]
    opt_state: Any


def _optimizer(config: HybridConfig) -> optax.GradientTransformation:
    return optax.adam(config.coefficient_rate, b1=0.6, b2=0.9)


def begin(start: Float[Array, "G P"], config: HybridConfig) -> Corrector:
    """A corrector at its start."""
    learned = {"shared": jnp.zeros(start.shape[1]), "own": jnp.zeros(start.shape)}
    return Corrector(start, learned, _optimizer(config).init(learned))


def coefficients(corrector: Corrector, config: HybridConfig) -> Float[Array, "G P"]:
    """Coefficients in units, bounded."""
    found = corrector.start + corrector.learned["shared"] + _OWN * corrector.learned["own"]
    return bounded(found, config)


def bounded(found: Float[Array, "G P"], config: HybridConfig) -> Float[Array, "G P"]:
    """At most `max_coefficient` each; what is no number becomes 0."""
    largest = config.max_coefficient
    return jnp.clip(jnp.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0), -largest, largest)


def units(basis: Any) -> Float[Array, "G P"]:
    """Factor of each tree: 1 for averages, window's length over its own for direction and move."""
    leaves = [leaf[-2:].astype(jnp.float32).reshape(2, -1) for leaf in jax.tree.leaves(basis)]
    direction, move = jnp.stack([jnp.linalg.norm(leaf, axis=1) for leaf in leaves], axis=1)
    averages = len(jax.tree.leaves(basis)[0]) - 2
    ones = [jnp.ones_like(move)] * averages
    return jnp.stack([*ones, move / jnp.maximum(direction, 1e-12), jnp.ones_like(move)], axis=1)


def gradient_step(
    corrector: Corrector,
    params: Any,
    basis: Any,
    batch: Any,
    loss_fn: LossFn,
    config: HybridConfig,
) -> tuple[Corrector, Array]:
    """One real gradient, carried to the coefficients alone; and the loss before it."""
    unit = units(basis)

    def loss(learned: dict[str, Array]) -> Array:
        c = coefficients(corrector._replace(learned=learned), config)
        return loss_fn(jumped(params, basis, c * unit), batch)

    value, gradient = jax.value_and_grad(loss)(corrector.learned)
    gradient = jax.tree.map(lambda leaf: jnp.nan_to_num(leaf, nan=0.0, posinf=0.0, neginf=0.0), gradient)
    updates, opt_state = _optimizer(config).update(gradient, corrector.opt_state)
    return Corrector(corrector.start, optax.apply_updates(corrector.learned, updates), opt_state), value
