"""What is known about a run: a pytree of fixed shape, updated once per window in one dispatch."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prime_jax.hybrid import basis as trees
from prime_jax.hybrid import calibration as judging
from prime_jax.hybrid import dynamics as rssm
from prime_jax.hybrid.bandit import Bandit, init_bandit
from prime_jax.hybrid.calibration import Calibration, init_calibration
from prime_jax.hybrid.dynamics import AHEAD, LENGTH, Dynamics, Lesson, init_dynamics
from prime_jax.hybrid.features import FEATURES, GRADIENTS, LOSSES, features_of
from prime_jax.hybrid.forecast import (
    EXPERTS,
    TREND,
    Mixture,
    base,
    experts,
    gaussians,
    init_mixture,
    learned,
    linear,
    mixed,
    spread,
    weights,
)
from prime_jax.hybrid.residuals import Residuals, init_residuals
from prime_jax.hybrid.settings import HybridConfig

MEANS = 64  # windows whose mean loss is remembered
_KEEP = 0.9  # of the normal equations, per window

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HybridState:
    """Everything observed so far. G groups (leaves of the weights), P trees in the basis, H horizons above 0.

    Attributes:
        anchor: Weights at the last observation, float32.
        basis: The trees a jump is made of, stacked `[P, ...]`: displacements of the averages from the anchor
            (one per time constant), the optimizer's next step without its learning rate, last window's move.
        losses: Of single steps, newest last, `[256]`.
        gradients: Gradient norms, `[64]`.
        means: Of the loss per window, `[64]`.
        features: Per window, `[24, 64]`.
        inner: Running `B'B`, `[G, P, P]`.
        onto: Running `B'move`, `[G, P]`.
        square: Running `|move|^2`, `[G]`.
        persistence: Share of a move that the next one repeats.
        dynamics: The predictor.
        told: What its coefficient head said last, `[G, P]`, added to the ridge solution.
        promised: Predictions that wait for their window, newest first: mean, sigma, persistence, trend,
            spread and what each of K experts said, `[12, H, 5 + K]`.
        calibration: How good predictions were.
        mixture: What the experts of the loss forecast are worth.
        residuals: Past jumps.
        bandit: Which horizons paid.
        observed: Windows seen.
        step: Real steps seen.
        key: Raw key data; folded with `observed`.
    """

    anchor: Tree
    basis: Tree
    losses: Any
    gradients: Any
    means: Any
    features: Any
    inner: Any
    onto: Any
    square: Any
    persistence: Any
    dynamics: Dynamics
    told: Any
    promised: Any
    calibration: Calibration
    mixture: Mixture
    residuals: Residuals
    bandit: Bandit
    observed: Any
    step: Any
    key: Any


def init_hybrid(params: Tree, config: HybridConfig) -> HybridState:
    """Nothing observed yet; averages begin at the weights."""
    kept = jnp.bfloat16 if config.half_precision else jnp.float32
    groups, size = len(jax.tree.leaves(params)), config.basis
    key = jax.random.key(config.seed)
    return HybridState(
        anchor=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params),
        basis=jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), kept), params),
        losses=jnp.zeros(LOSSES),
        gradients=jnp.zeros(GRADIENTS),
        means=jnp.zeros(MEANS),
        features=jnp.zeros((LENGTH + AHEAD, FEATURES)),
        inner=jnp.zeros((groups, size, size)),
        onto=jnp.zeros((groups, size)),
        square=jnp.zeros(groups),
        persistence=jnp.zeros(()),
        dynamics=init_dynamics(key, groups, config),
        told=jnp.zeros((groups, size)),
        promised=jnp.zeros((AHEAD, len(config.horizons) - 1, 5 + len(EXPERTS))),
        calibration=init_calibration(len(config.horizons) - 1),
        mixture=init_mixture(len(config.horizons) - 1),
        residuals=init_residuals(config.residual_capacity, groups, size),
        bandit=init_bandit(len(config.horizons), FEATURES),
        observed=jnp.zeros((), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


def observe(
    old: HybridState,
    params: Tree,
    moments: tuple[Tree, Tree] | None,
    losses: Float[Array, " W"],
    gradients: Float[Array, " W"],
    config: HybridConfig,
) -> tuple[HybridState, dict[str, Array]]:
    """Learn from a window of real steps; what the host needs to know of it is in the second value.

    Args:
        old: Before the window.
        params: Weights after it.
        moments: The optimizer's, now; None where gradients are hidden: the window's move stands in as
            pseudo-gradient.
        losses: Of its steps.
        gradients: Gradient norms of its steps; the length of the window's move where they are hidden.
        config: Settings.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(old.key), old.observed)
    first = old.observed == 0
    # what the basis of the window's beginning would have said of its move
    move = _difference(params, old.anchor)
    inner, onto, square = trees.gram(old.basis, move)
    ridge = trees.best_coefficients(old.inner, old.onto)
    unit = _unit(old.inner, old.square)
    a = ridge + old.told * unit
    misfit = trees.misfit(a, inner, onto, square)
    # the rings
    mean = jnp.mean(losses)
    all_losses = _pushed(jnp.where(first, losses[0], old.losses), losses)
    all_gradients = _pushed(jnp.where(first, gradients[0], old.gradients), gradients)
    means = _pushed(jnp.where(first, mean, old.means), mean[None])
    # predictions made for this window
    ahead = jnp.asarray(windows_of(config))
    rows = old.promised[ahead - 1, jnp.arange(len(ahead))]
    due = old.observed >= ahead + TREND
    calibration = judging.judge(old.calibration, rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], mean, due)
    unit_then = jnp.maximum(rows[:, 4], 1e-6)
    mixture = learned(old.mixture, rows[:, 5:], mean - rows[:, 2], unit_then, due)
    # features
    ends = jnp.array([0, len(config.ema_steps) - 1, config.basis - 2, config.basis - 1])
    diagonal = jnp.sqrt(jnp.sum(jnp.diagonal(inner, axis1=1, axis2=2), axis=0)[ends])
    length = jnp.sqrt(jnp.sum(square))
    cosines = jnp.sum(onto, axis=0)[ends] / jnp.maximum(diagonal * length, 1e-12)
    step = old.step + len(losses)
    four = jnp.linspace(0, len(ahead) - 1, 4).astype(jnp.int32)
    seen = features_of(
        all_losses,
        all_gradients,
        cosines,
        diagonal / jnp.maximum(length, 1e-12),
        1 - misfit,
        step.astype(jnp.float32),
        judging.skill(calibration)[four],
        calibration.last[four],
    )
    features = _pushed(old.features, seen[None])
    # one lesson for the dynamics model
    past = means[:-AHEAD]
    lesson = Lesson(
        features=features[:-1],
        deviation=jnp.clip((means[-AHEAD:] - base(past)) / spread(past), -10.0, 10.0),
        known=jnp.broadcast_to(old.observed >= AHEAD + TREND, (AHEAD,)).astype(jnp.float32),
        ridge=ridge,
        unit=unit,
        inner=inner,
        onto=onto,
        square=square,
    )
    dynamics, trouble = rssm.learn(old.dynamics, lesson, jax.random.fold_in(key, 2), config, trees.misfit)
    # new predictions
    moved = rssm.rollout(dynamics, features[-LENGTH:], jax.random.fold_in(key, 3), config)
    centre, deviation = gaussians(moved.mean, moved.log_variance)
    deviation = jnp.where(jnp.isfinite(deviation), deviation, 1.0)
    said = experts(means, centre)[ahead - 1]
    usual = spread(means)
    promise = jnp.concatenate(
        [
            jnp.stack(
                [
                    jnp.maximum(mean + mixed(weights(mixture), said), 0.0),
                    judging.deviation(calibration, usual * deviation[ahead - 1]),
                    jnp.broadcast_to(mean, ahead.shape),
                    linear(means)[ahead - 1],
                    jnp.broadcast_to(usual, ahead.shape),
                ],
                axis=-1,
            ),
            said,
        ],
        axis=-1,
    )
    keep = jnp.where(old.observed < 2, 0.5, _KEEP)
    again = jnp.sum(onto[:, -1]) / jnp.maximum(jnp.sum(inner[:, -1, -1]), 1e-12)
    following = replace(
        old,
        losses=all_losses,
        gradients=all_gradients,
        means=means,
        features=features,
        inner=keep * old.inner + (1 - keep) * inner,
        onto=keep * old.onto + (1 - keep) * onto,
        square=keep * old.square + (1 - keep) * square,
        persistence=jnp.clip(keep * old.persistence + (1 - keep) * again, 0.0, 0.98),
        dynamics=dynamics,
        told=jnp.mean(moved.coefficients, axis=0),
        promised=jnp.concatenate([promise[None], old.promised[:-1]]),
        calibration=calibration,
        mixture=mixture,
        observed=old.observed + 1,
    )
    told = {
        "cosine": trees.cosine(a, inner, onto, square),
        "confidence": calibration.confidence,
        "skill": judging.skill(calibration),
        "last_error": jnp.max(jnp.where(due, jnp.abs(calibration.last), 0.0)),
        "predicted": promise[:, 0],
        "sigma": promise[:, 1] * jnp.exp(calibration.log_scale),
        "predictor_finite": jnp.all(jnp.isfinite(trouble)),
        "features": seen,
    }
    return settled(following, params, moments, len(losses), config, key), told


def settled(
    old: HybridState,
    params: Tree,
    moments: tuple[Tree, Tree] | None,
    steps: Any,
    config: HybridConfig,
    key: Any,
) -> HybridState:
    """The trees moved on by some real steps; nothing else learns."""
    move = _difference(params, old.anchor)
    decays = (1 - 1 / jnp.asarray(config.ema_steps, jnp.float32)) ** steps
    direction = move if moments is None else trees.direction_of(moments)
    return replace(
        old,
        anchor=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params),
        basis=trees.moved_on(old.basis, move, direction, decays, jax.random.fold_in(key, 4)),
        step=old.step + steps,
    )


def predict(state: HybridState, horizon: Any, config: HybridConfig) -> tuple[Array, Array, Array]:
    """The aggregate of `horizon` steps at once: loss, its deviation, and coefficients `[G, P]`.

    Args:
        state: What is known.
        horizon: Steps, traced: one program for all.
        config: Settings.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 2**30 + state.observed)
    expected = rssm.rollout(state.dynamics, state.features[-LENGTH:], key, config)
    count = horizon / config.window
    centre, _ = gaussians(expected.mean, expected.log_variance)
    ahead = jnp.asarray(windows_of(config))
    told = mixed(weights(state.mixture), experts(state.means, centre)[ahead - 1])
    at, known = jnp.asarray(horizon, jnp.float32), jnp.asarray(config.horizons[1:], jnp.float32)
    mean = state.means[-1] + jnp.interp(at, known, told)
    sigma = jnp.interp(at, known, state.promised[0, :, 1] * jnp.exp(state.calibration.log_scale))
    unit = _unit(state.inner, state.square)
    a = trees.best_coefficients(state.inner, state.onto) + jnp.mean(expected.coefficients, 0) * unit
    gamma = state.persistence  # later windows repeat this one's move, less and less
    return jnp.maximum(mean, 0.0), sigma, a * (1 - gamma**count) / (1 - gamma)


def windows_of(config: HybridConfig) -> tuple[int, ...]:
    """Windows ahead of every horizon above 0, rounded up."""
    return tuple(-(-steps // config.window) for steps in config.horizons[1:])


def _unit(inner: Array, square: Array) -> Array:
    length = jnp.diagonal(inner, axis1=1, axis2=2)
    found: Array = jnp.sqrt(square[:, None] / jnp.maximum(length, 1e-12)) * (length > 1e-12)
    return found


def _difference(one: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, one, other)


def _pushed(ring: Array, new: Array) -> Array:
    return jnp.concatenate([ring, new])[-len(ring) :]
