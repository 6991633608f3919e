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
from prime_jax.hybrid.residuals import Residuals, init_residuals
from prime_jax.hybrid.settings import HybridConfig

MEANS = 64  # windows whose mean loss is remembered
TREND = 12  # windows that a trend is fitted to
_DAMPING = 0.9
_KEEP = 0.9  # of the normal equations, per window

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HybridState:
    """Everything observed so far. G groups (leaves of the weights), P trees in the basis, H horizons above 0.

    Attributes:
        anchor: Weights at the last observation, float32.
        displacements: Of the averages from the anchor, one tree per time constant.
        direction: The optimizer's next step at the anchor, without its learning rate.
        move: Last window's move.
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
            `[12, H, 4]`.
        calibration: How good predictions were.
        residuals: Past jumps.
        bandit: Which horizons paid.
        observed: Windows seen.
        step: Real steps seen.
        key: Raw key data; folded with `observed`.
    """

    anchor: Tree
    displacements: tuple[Tree, ...]
    direction: Tree
    move: Tree
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
    residuals: Residuals
    bandit: Bandit
    observed: Any
    step: Any
    key: Any

    @property
    def basis(self) -> tuple[Tree, ...]:
        """The trees a jump is made of: displacements, direction, last move."""
        return (*self.displacements, self.direction, self.move)


def init_hybrid(params: Tree, config: HybridConfig) -> HybridState:
    """Nothing observed yet; averages begin at the weights."""
    kept = jnp.bfloat16 if config.half_precision else jnp.float32
    groups, size = len(jax.tree.leaves(params)), config.basis
    key = jax.random.key(config.seed)

    def nothing() -> Tree:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, kept), params)

    return HybridState(
        anchor=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params),
        displacements=tuple(nothing() for _ in config.ema_steps),
        direction=nothing(),
        move=nothing(),
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
        promised=jnp.zeros((AHEAD, len(config.horizons) - 1, 4)),
        calibration=init_calibration(len(config.horizons) - 1),
        residuals=init_residuals(config.residual_capacity, groups, size),
        bandit=init_bandit(len(config.horizons), FEATURES),
        observed=jnp.zeros((), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


def observe(
    old: HybridState,
    params: Tree,
    direction: Tree | None,
    losses: Float[Array, " W"],
    gradients: Float[Array, " W"],
    config: HybridConfig,
) -> tuple[HybridState, dict[str, Array]]:
    """Learn from a window of real steps; what the host needs to know of it is in the second value.

    Args:
        old: Before the window.
        params: Weights after it.
        direction: The optimizer's next step now; None where gradients are hidden: the window's move stands
            in as pseudo-gradient.
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
    cosine = trees.cosine(a, inner, onto, square)
    told = {
        "cosine": cosine,
        "misfit": trees.misfit(a, inner, onto, square),
        "cosine_direction": trees.cosine(jnp.zeros_like(a).at[:, -2].set(1.0), inner, onto, square),
    }
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
        1 - told["misfit"],
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
    centre, deviation = mixture(moved.mean, moved.log_variance)
    promise = jnp.stack(
        [
            (base(means) + spread(means) * centre)[ahead - 1],
            (spread(means) * deviation)[ahead - 1],
            jnp.broadcast_to(mean, ahead.shape),
            linear(means)[ahead - 1],
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
        observed=old.observed + 1,
    )
    told |= {
        "confidence": calibration.confidence,
        "skill": judging.skill(calibration),
        "last_error": jnp.max(jnp.where(due, jnp.abs(calibration.last), 0.0)),
        "predicted": promise[:, 0],
        "sigma": promise[:, 1] * jnp.exp(calibration.log_scale),
        "predictor_finite": jnp.all(jnp.isfinite(trouble)),
        "features": seen,
    }
    return settled(following, params, direction, len(losses), config, key), told


def settled(
    old: HybridState, params: Tree, direction: Tree | None, steps: Any, config: HybridConfig, key: Any
) -> HybridState:
    """The trees moved on by some real steps; nothing else learns."""
    kept = jax.tree.leaves(old.move)[0].dtype
    move = _difference(params, old.anchor)
    keys = jax.random.split(jax.random.fold_in(key, 4), config.basis)
    displacements = tuple(
        trees.stored(trees.displaced(d, move, (1 - 1 / constant) ** steps), kept, one)
        for d, constant, one in zip(old.displacements, config.ema_steps, keys, strict=False)
    )
    return replace(
        old,
        anchor=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params),
        displacements=displacements,
        direction=trees.stored(move if direction is None else direction, kept, keys[-2]),
        move=trees.stored(move, kept, keys[-1]),
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
    centre, deviation = mixture(expected.mean, expected.log_variance)
    at = jnp.clip(count - 1, 0, AHEAD - 1)
    position = jnp.arange(AHEAD, dtype=jnp.float32)
    mean = jnp.interp(at, position, base(state.means) + spread(state.means) * centre)
    sigma = jnp.interp(at, position, spread(state.means) * deviation)
    scale = jnp.interp(
        jnp.asarray(horizon, jnp.float32),
        jnp.asarray(config.horizons[1:], jnp.float32),
        jnp.exp(state.calibration.log_scale),
    )
    unit = _unit(state.inner, state.square)
    a = trees.best_coefficients(state.inner, state.onto) + jnp.mean(expected.coefficients, 0) * unit
    gamma = state.persistence  # later windows repeat this one's move, less and less
    return jnp.maximum(mean, 0.0), sigma * scale, a * (1 - gamma**count) / (1 - gamma)


def windows_of(config: HybridConfig) -> tuple[int, ...]:
    """Windows ahead of every horizon above 0, rounded up."""
    return tuple(-(-steps // config.window) for steps in config.horizons[1:])


def mixture(mean: Float[Array, "E T"], log_variance: Float[Array, "E T"]) -> tuple[Array, Array]:
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


def _unit(inner: Array, square: Array) -> Array:
    length = jnp.diagonal(inner, axis1=1, axis2=2)
    found: Array = jnp.sqrt(square[:, None] / jnp.maximum(length, 1e-12)) * (length > 1e-12)
    return found


def _difference(one: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, one, other)


def _pushed(ring: Array, new: Array) -> Array:
    return jnp.concatenate([ring, new])[-len(ring) :]
