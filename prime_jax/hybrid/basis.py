"""The few trees that a jump is made of, and what a window's move looks like in them.

An average is kept as its displacement d = average - weights, which changes by d <- decay (d - move): small
numbers, so that bfloat16 suffices. Coefficients `a[G, P]` (groups are the leaves) make a move
sum_p a[g, p] B_p.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

Tree = Any
_SMALL = 1e-12


def optimizer_direction(opt_state: Any, like: Tree) -> Tree | None:
    """Adam's next step without its learning rate, found by type; None where there are no moments.

    Args:
        opt_state: Any optax state, however nested.
        like: Tree of the weights; moments of another structure are not theirs.
    """
    found = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
    for state in found:
        if isinstance(state, optax.ScaleByAdamState) and _same(state.mu, like):
            return jax.tree.map(lambda m, v: -m / (jnp.sqrt(v) + 1e-8), state.mu, state.nu)
    return None


def _same(one: Tree, other: Tree) -> bool:
    def shapes(tree: Tree) -> Tree:
        return jax.tree.map(jnp.shape, tree)

    one_structure: Any = jax.tree.structure(one)
    return bool(one_structure == jax.tree.structure(other)) and bool(shapes(one) == shapes(other))


def stored(tree: Tree, dtype: Any, key: PRNGKeyArray) -> Tree:
    """A float32 tree in the dtype that is kept; bfloat16 is rounded stochastically, so right on average."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    leaves: list[Array] = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    seeds = jax.random.bits(key, (len(leaves),), jnp.uint32)
    return structure.unflatten([_rounded(leaf, seeds[at]) for at, leaf in enumerate(leaves)])


def _rounded(leaf: Array, seed: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    kept = (bits + (_hashed(leaf.shape, seed) & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(rounded), rounded, leaf).astype(jnp.bfloat16)


def _hashed(shape: tuple[int, ...], seed: Array) -> Array:
    """Noise of an element from its place (murmur3's finalizer): elementwise, so it lies as the leaf does."""
    x = seed
    for axis, factor in zip(
        range(len(shape)), (0x9E3779B9, 0x7FEB352D, 0x846CA68B, 0x58B0C2F9), strict=False
    ):
        x = x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(factor)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def displaced(displacement: Tree, move: Tree, decay: Array | float) -> Tree:
    """Displacement of an average after the weights made `move`."""
    return jax.tree.map(lambda d, m: decay * (d.astype(jnp.float32) - m), displacement, move)


def gram(basis: tuple[Tree, ...], move: Tree) -> tuple[Array, Array, Array]:
    """`B'B [G, P, P]`, `B'move [G, P]` and `|move|^2 [G]` per group."""

    def one(*leaves: Array) -> tuple[Array, Array, Array]:
        *parts, moved = (leaf.astype(jnp.float32).reshape(-1) for leaf in leaves)
        rows = jnp.stack(parts)
        return rows @ rows.T, rows @ moved, moved @ moved

    found = [one(*leaves) for leaves in zip(*map(jax.tree.leaves, (*basis, move)), strict=True)]
    inner, onto, square = (jnp.stack(part) for part in zip(*found, strict=True))
    return inner, onto, square


def best_coefficients(
    inner: Float[Array, "G P P"], onto: Float[Array, "G P"], ridge: float = 0.03
) -> Float[Array, "G P"]:
    """Ridge solution per group, in units of each tree's length."""
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(inner, axis1=1, axis2=2), _SMALL))
    cosines = inner / (scale[:, :, None] * scale[:, None, :]) + ridge * jnp.eye(inner.shape[-1])
    found: Array = jnp.linalg.solve(cosines, (onto / scale)[..., None])[..., 0] / scale
    return found


def misfit(a: Array, inner: Array, onto: Array, square: Array) -> Array:
    """|B a - move|^2 / |move|^2 over all groups: 1 for no prediction, 0 for a perfect one."""
    error = jnp.einsum("gp,gpq,gq->g", a, inner, a) - 2 * jnp.sum(a * onto, axis=1) + square
    return jnp.sum(error) / jnp.maximum(jnp.sum(square), _SMALL)


def cosine(a: Array, inner: Array, onto: Array, square: Array) -> Array:
    """Cosine between B a and the move, over all groups."""
    length = jnp.sum(jnp.einsum("gp,gpq,gq->g", a, inner, a)) * jnp.sum(square)
    return jnp.sum(a * onto) / jnp.sqrt(jnp.maximum(length, _SMALL))


def jumped(params: Tree, basis: tuple[Tree, ...], a: Float[Array, "G P"]) -> Tree:
    """Weights moved by `sum_p a[g, p] B_p`, in their own dtype."""
    leaves: list[Array] = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    parts = [jax.tree.leaves(tree) for tree in basis]
    moved = []
    for g, leaf in enumerate(leaves):
        move = sum(a[g, p] * part[g].astype(jnp.float32) for p, part in enumerate(parts))
        moved.append((leaf.astype(jnp.float32) + move).astype(leaf.dtype))
    return structure.unflatten(moved)
