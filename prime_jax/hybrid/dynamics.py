"""RSSM-lite: a GRU with a sampled stochastic state that predicts loss and coefficients windows ahead.

Hafner et al. 2019 (arXiv 1811.04551), small: members of an ensemble are stacked, every weight is trained by
backpropagation through time at each observation. The loss head predicts the deviation from a damped linear
trend with Gaussian negative log likelihood; prior and posterior are tied by their KL divergence; the
coefficient head starts at nothing and adds to a ridge solution. All is measured in windows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from prime_jax.hybrid.features import FEATURES
from prime_jax.hybrid.settings import HybridConfig

LENGTH = 12  # windows that a state is filtered from
AHEAD = 12  # windows predicted at most
_KL = 0.1
Params = Any


class Dynamics(NamedTuple):
    """The ensemble's parameters, stacked `[E, ...]`, and its optimizer."""

    params: Params
    opt_state: Any


class Rollout(NamedTuple):
    """What is predicted for each of `AHEAD` windows, `[E, AHEAD]`, and coefficients `[E, G, P]`."""

    mean: Array
    log_variance: Array
    coefficients: Array


def init_dynamics(key: PRNGKeyArray, groups: int, config: HybridConfig) -> Dynamics:
    """Fresh weights."""
    params = jax.vmap(lambda one: _member(one, groups, config))(jax.random.split(key, config.ensemble))
    return Dynamics(params, _optimizer(config).init(params))


def _optimizer(config: HybridConfig) -> optax.GradientTransformation:
    return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.dynamics_rate)))


def _member(key: PRNGKeyArray, groups: int, config: HybridConfig) -> Params:
    h, z, f = config.hidden, config.latent, FEATURES
    shapes = {"input": (f + z, 3 * h), "state": (h, 3 * h), "prior": (h, 2 * z), "post": (h + f, 2 * z)}
    keys = jax.random.split(key, len(shapes))
    params = {
        name: {"w": jax.random.normal(one, shape) / jnp.sqrt(shape[0]), "b": jnp.zeros(shape[1])}
        for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    for name, width in (("loss", 2), ("coefficients", groups * config.basis)):
        params[name] = {"w": jnp.zeros((h + z, width)), "b": jnp.zeros(width)}
    return params


def _linear(layer: Any, x: Array) -> Array:
    told: Array = x @ layer["w"] + layer["b"]
    return told


def _gru(params: Params, h: Array, x: Array) -> Array:
    """One step; `x` went through the input layer already."""
    reset, keep, new = jnp.split(x, 3)
    reset_h, keep_h, new_h = jnp.split(_linear(params["state"], h), 3)
    keep = jax.nn.sigmoid(keep + keep_h)
    return keep * h + (1 - keep) * jnp.tanh(new + jax.nn.sigmoid(reset + reset_h) * new_h)


def _halves(told: Array) -> tuple[Array, Array]:
    """Mean and logarithm of the deviation of a Gaussian."""
    mean, spread = jnp.split(told, 2, axis=-1)
    return mean, jnp.clip(spread, -5.0, 2.0)


def _filter(params: Params, features: Array, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
    """Posterior states `h [T, H]` and `z [T, Z]` as features are seen; mean KL of posterior to prior."""
    hidden, latent = params["state"]["w"].shape[0], params["prior"]["w"].shape[1] // 2
    into_state, from_latent = jnp.split(params["input"]["w"], [FEATURES])
    into_post = params["post"]["w"][hidden:]
    inputs = features @ into_state + params["input"]["b"]
    to_post = features @ into_post + params["post"]["b"]
    posterior = params["post"]["w"][:hidden]

    def see(carry: tuple[Array, Array], x: tuple[Array, ...]) -> tuple[tuple[Array, Array], Any]:
        (h, z), (seen, told, noise) = carry, x
        h = _gru(params, h, seen + z @ from_latent)
        mean, spread = _halves(told + h @ posterior)
        z = mean + jnp.exp(spread) * noise
        return (h, z), (h, z, mean, spread)

    noise = jax.random.normal(key, (len(features), latent))
    start = (jnp.zeros(hidden), jnp.zeros(latent))
    _, (h, z, m1, s1) = jax.lax.scan(see, start, (inputs, to_post, noise))
    m0, s0 = _halves(_linear(params["prior"], h))
    kl = s0 - s1 + 0.5 * (jnp.exp(2 * (s1 - s0)) + (m1 - m0) ** 2 * jnp.exp(-2 * s0) - 1)
    return h, z, jnp.mean(jnp.sum(kl, axis=-1))


def _roll(params: Params, h: Array, z: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Mean and log-variance of the deviation for each window ahead, imagined with sampled states."""
    into_latent = params["input"]["w"][FEATURES:]

    def imagine(carry: tuple[Array, Array], noise: Array) -> tuple[tuple[Array, Array], Any]:
        h, z = carry
        after = _gru(params, h, z @ into_latent + params["input"]["b"])
        mean, spread = _halves(_linear(params["prior"], after))
        return (after, mean + jnp.exp(spread) * noise), (h, z)

    noise = jax.random.normal(key, (AHEAD, z.shape[0]))
    _, states = jax.lax.scan(imagine, (h, z), noise)
    told = _linear(params["loss"], jnp.concatenate(states, axis=-1))
    return told[:, 0], jnp.clip(told[:, 1], -6.0, 6.0)


def rollout(
    dynamics: Dynamics, features: Float[Array, "T F"], key: PRNGKeyArray, config: HybridConfig
) -> Rollout:
    """What every member expects."""

    def one(params: Params, own: PRNGKeyArray) -> Rollout:
        h, z, _ = _filter(params, features, own)
        mean, log_variance = _roll(params, h[-1], z[-1], jax.random.fold_in(own, 1))
        told = _linear(params["coefficients"], jnp.concatenate([h[-1], z[-1]]))
        return Rollout(mean, log_variance, told.reshape(-1, config.basis))

    return jax.vmap(one)(dynamics.params, jax.random.split(key, config.ensemble))


class Lesson(NamedTuple):
    """What an observation teaches.

    Attributes:
        features: As they were before the last window, `[LENGTH + AHEAD - 1, F]`; the first `LENGTH` were
            there before the windows that are predicted.
        deviation: Of the losses of the `AHEAD` windows since then from their trend, `[AHEAD]`.
        known: Which of these windows were seen, `[AHEAD]`.
        ridge: Coefficients that the head adds to, `[G, P]`.
        unit: Length that a coefficient of the head is measured in, `[G, P]`.
        inner: `B'B` of the last window, `[G, P, P]`.
        onto: `B'move`, `[G, P]`.
        square: `|move|^2`, `[G]`.
    """

    features: Array
    deviation: Array
    known: Array
    ridge: Array
    unit: Array
    inner: Array
    onto: Array
    square: Array


def learn(
    dynamics: Dynamics, lesson: Lesson, key: PRNGKeyArray, config: HybridConfig, misfit: Any
) -> tuple[Dynamics, Array]:
    """One update of every weight of every member; the loss before it, `[E]`."""

    def loss(params: Params, own: PRNGKeyArray) -> Array:
        h, z, kl = _filter(params, lesson.features, own)
        mean, log_variance = _roll(params, h[LENGTH - 1], z[LENGTH - 1], jax.random.fold_in(own, 1))
        error = (lesson.deviation - mean) ** 2 * jnp.exp(-log_variance) + log_variance
        nll = 0.5 * jnp.sum(lesson.known * error) / jnp.maximum(1.0, jnp.sum(lesson.known))
        told = _linear(params["coefficients"], jnp.concatenate([h[-1], z[-1]])).reshape(lesson.unit.shape)
        a = lesson.ridge + told * lesson.unit
        wrong = jnp.minimum(misfit(a, lesson.inner, lesson.onto, lesson.square), 10.0)
        return nll + _KL * kl + wrong

    def total(params: Params) -> tuple[Array, Array]:
        each = jax.vmap(loss)(params, jax.random.split(key, config.ensemble))
        return jnp.sum(each), each

    gradient, each = jax.grad(total, has_aux=True)(dynamics.params)
    updates, opt_state = _optimizer(config).update(gradient, dynamics.opt_state)
    moved = Dynamics(optax.apply_updates(dynamics.params, updates), opt_state)
    fine = jnp.all(jnp.isfinite(each))
    kept: Dynamics = jax.tree.map(lambda new, old: jnp.where(fine, new, old), moved, dynamics)
    return kept, each
