"""The compiled parts of a hybrid run, shared by all trainers of the same settings and loss."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from prime_jax.hybrid import bandit, corrector, residuals
from prime_jax.hybrid.basis import jumped, optimizer_direction
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.state import HybridState, init_hybrid, observe, predict, settled


class Programs(NamedTuple):
    """Jitted functions.

    Attributes:
        init: `weights -> HybridState`.
        observe: One window; uses the state up.
        settle: Trees only; uses the state up.
        jump: A whole PREDICT phase.
        choose: Bound of every horizon.
        gradient: One real gradient on coefficients.
        move: Weights moved along the basis.
        direction: The optimizer's next step.
        loss: As it is judged.
    """

    init: Any
    observe: Any
    settle: Any
    jump: Any
    choose: Any
    gradient: Any
    move: Any
    direction: Any
    loss: Any


@lru_cache(maxsize=8)
def programs(
    config: HybridConfig, loss_fn: Callable[[Any, Any], Any], get_params: Callable[[Any], Any]
) -> Programs:
    """What a trainer runs."""
    return Programs(
        init=jax.jit(partial(init_hybrid, config=config)),
        observe=jax.jit(partial(observe, config=config), donate_argnums=0),
        settle=jax.jit(partial(settled, config=config), donate_argnums=0),
        jump=jax.jit(partial(jump, config=config)),
        choose=jax.jit(partial(bandit.scores, exploration=config.exploration)),
        gradient=jax.jit(partial(corrector.gradient_step, loss_fn=loss_fn, config=config)),
        move=jax.jit(jumped),
        direction=jax.jit(lambda state: optimizer_direction(state, get_params(state))),
        loss=jax.jit(loss_fn),
    )


def jump(hybrid: HybridState, params: Any, horizon: Any, config: HybridConfig) -> tuple[Array, Array, Any]:
    """One program for a whole PREDICT phase, Y traced.

    Returns:
        The loss that is expected after Y steps, the coefficients in units, and the weights there. The store
        of past jumps corrects both.
    """
    loss, _, a = predict(hybrid, horizon, config)
    unit = corrector.units(hybrid.basis)
    similar = residuals.look_up(hybrid.residuals, hybrid.features[-1])
    told = jnp.where(unit > 0, a / jnp.maximum(unit, 1e-12), 0.0)
    c = corrector.bounded(told + similar.agreement * similar.coefficients, config)
    return loss + similar.agreement * similar.loss, c, jumped(params, hybrid.basis, c * unit)
