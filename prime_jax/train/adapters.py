"""Low-rank updates of frozen layers (LoRA, arXiv 2106.09685): what is trained when memory is short.

Beside every matrix `[I, O]` of the transformer layers lie `a [I, r]` and `b [r, O]`; the layer computes with
the matrix plus `a @ b`. The optimizer keeps moments of `a` and `b` alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

LAYERS = "layers"


def layers_of(params: Any) -> Any | None:
    """The layers among a model's parameters, at the top or in one of its parts; None where it has none."""
    found = None
    if isinstance(params, dict):
        parts = [params, *(part for part in params.values() if isinstance(part, dict))]
        found = next((part[LAYERS] for part in parts if LAYERS in part), None)
    return found


def with_layers(params: Any, layers: Any) -> Any:
    """A model's parameters with other layers in the place of `layers_of`."""
    if LAYERS in params:
        return {**params, LAYERS: layers}
    owner = next(name for name, part in params.items() if isinstance(part, dict) and LAYERS in part)
    return {**params, owner: {**params[owner], LAYERS: layers}}


def initial_adapters(key: Key[Array, ""], params: Any, rank: int) -> Any:
    """Adapters for a model's layers that change nothing yet: `a` is random, `b` zero.

    Args:
        key: Source of `a`.
        params: The model's parameters as nested dicts.
        rank: r.
    """

    def beside(tree: Any, key: Key[Array, ""]) -> Any:
        if not isinstance(tree, dict):
            rows, columns = tree.shape
            spread = jax.random.normal(key, (rows, rank)) / jnp.sqrt(jnp.float32(rows))
            return {"a": spread, "b": jnp.zeros((rank, columns))}
        found = {}
        for number, (name, below) in enumerate(sorted(tree.items(), key=lambda item: str(item[0]))):
            if isinstance(below, dict) or below.ndim == 2:
                found[name] = beside(below, jax.random.fold_in(key, number))
        return {name: low for name, low in found.items() if low}

    return beside(layers_of(params), key)


def with_adapters(params: Any, adapters: Any | None) -> Any:
    """A model's parameters with the adapters added to its matrices; without any, as they are."""
    if adapters is None:
        return params

    def add(tree: Any, low: Any) -> Any:
        if not isinstance(tree, dict):
            with jax.named_scope("adapters"):
                return tree + jnp.matmul(low["a"], low["b"], precision=jax.lax.Precision.HIGHEST)
        return {name: add(below, low[name]) if name in low else below for name, below in tree.items()}

    return with_layers(params, add(layers_of(params), adapters))


def change_frozen(params: Any, change: Callable[[Any], Any]) -> Any:
    """A model's parameters with those changed that frozen layers mean.

    These are the layers; where they belong to an encoder within the model, its embeddings and norms, too.
    """
    if LAYERS in params:
        return {**params, LAYERS: change(params[LAYERS])}
    return {
        name: change(part) if isinstance(part, dict) and LAYERS in part else part
        for name, part in params.items()
    }


def without_gradient(params: Any) -> Any:
    """A model's parameters, what is frozen held fixed."""
    return change_frozen(params, jax.lax.stop_gradient)
