"""The compiled parts of a hybrid run, shared by all trainers of the same settings and loss."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from prime_jax.hybrid import bandit, corrector, residuals
from prime_jax.hybrid.basis import jumped
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.state import HybridState, init_hybrid, observe, predict, settled


class Programs(NamedTuple):
    """Jitted functions.

    Attributes:
        init: `weights -> HybridState`, lying as the weights do.
        observe: One window; uses the state up.
        settle: Trees only; uses the state up.
        jump: A whole PREDICT phase.
        choose: Bound of every horizon.
        gradient: One real gradient on coefficients.
        move: Weights moved along the basis, by coefficients in units.
        loss: As it is judged.
    """

    init: Any
    observe: Any
    settle: Any
    jump: Any
    choose: Any
    gradient: Any
    move: Any
    loss: Any


_OF_THE_HOST = frozenset(
    {
        *("enabled", "predict", "correct", "snapshot", "max_rollbacks", "virtual_steps", "probe_share"),
        *("confidence_threshold", "accept_level", "control_batches", "coefficient_gradients"),
        *("screen_batches", "screen_level"),
        *("loss_sigma", "gradient_factor", "error_sigma", "oscillation"),
    }
)


def programs(config: HybridConfig, loss_fn: Callable[[Any, Any], Any]) -> Programs:
    """What a trainer runs; trainers that differ in settings of the host alone share it."""
    same: dict[str, Any] = {
        field.name: field.default for field in fields(HybridConfig) if field.name in _OF_THE_HOST
    }
    for length in ("warmup_steps", "min_full_steps", "max_full_steps"):
        same[length] = config.window  # the least that it can be
    return _programs(replace(config, **same), loss_fn)


@lru_cache(maxsize=8)
def _programs(config: HybridConfig, loss_fn: Callable[[Any, Any], Any]) -> Programs:
    return Programs(
        init=partial(_laid_out, jax.jit(partial(init_hybrid, config=config))),
        observe=jax.jit(partial(observe, config=config), donate_argnums=0),
        settle=jax.jit(partial(settled, config=config), donate_argnums=0),
        jump=jax.jit(partial(jump, config=config)),
        choose=jax.jit(partial(bandit.scores, exploration=config.exploration)),
        gradient=jax.jit(partial(corrector.gradient_step, loss_fn=loss_fn, config=config)),
        move=jax.jit(lambda params, basis, c: jumped(params, basis, c * corrector.units(basis))),
        loss=jax.jit(loss_fn),
    )


def _laid_out(make: Any, params: Any) -> HybridState:
    """A fresh state; its trees are sharded as the weights are, all else is on every device."""
    placed = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    named = [where for where in placed if isinstance(where, NamedSharding)]
    if len(named) < len(placed) or not named:
        made: HybridState = make(params)
        return made
    everywhere = NamedSharding(named[0].mesh, PartitionSpec())
    layout = jax.tree.map(lambda _: everywhere, jax.eval_shape(make, params))
    structure: Any = jax.tree.structure(params)
    stacks = [NamedSharding(where.mesh, PartitionSpec(None, *where.spec)) for where in named]
    fields = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
    fields |= {"anchor": structure.unflatten(named), "basis": structure.unflatten(stacks)}
    sharded: HybridState = jax.jit(make, out_shardings=HybridState(**fields))(params)
    return sharded


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
