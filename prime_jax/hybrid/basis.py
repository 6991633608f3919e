"""The few trees that a jump is made of, and what a window's move looks like in them.

P trees are one tree whose leaves are `[P, ...]`: one kernel per leaf instead of P. An average is kept as its
displacement d = average - weights, which changes by d <- decay (d - move): small numbers, so that bfloat16
suffices. Coefficients `a[G, P]` (groups are the leaves) make a move sum_p a[g, p] B_p.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

Tree = Any
_SMALL = 1e-12


def moments(state: Any, like: Tree) -> tuple[Tree, Tree] | None:
    """Adam's two moments, found by type; None where there are none.

    Args:
        state: Any optax state, or a state that holds one, however nested.
        like: Tree of the weights; moments of another structure are not theirs.
    """
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
    for part in found:
        if isinstance(part, optax.ScaleByAdamState) and _same(part.mu, like):
            return part.mu, part.nu
    return None


def direction_of(known: tuple[Tree, Tree]) -> Tree:
    """Adam's next step without its learning rate."""
    return jax.tree.map(
        lambda m, v: -m.astype(jnp.float32) / (jnp.sqrt(v.astype(jnp.float32)) + 1e-8), *known
    )


def _same(one: Tree, other: Tree) -> bool:
    def shapes(tree: Tree) -> Tree:
        return jax.tree.map(jnp.shape, tree)

    one_structure: Any = jax.tree.structure(one)
    return bool(one_structure == jax.tree.structure(other)) and bool(shapes(one) == shapes(other))


def moved_on(basis: Tree, move: Tree, direction: Tree, decays: Float[Array, " A"], key: PRNGKeyArray) -> Tree:
    """The stack after the weights made `move`, in one pass over each leaf.

    bfloat16 is rounded stochastically, so it is right on average.

    Args:
        basis: `[P, ...]` leaves: A displacements, the direction, the move before.
        move: What the weights did, float32.
        direction: The optimizer's next step now, float32.
        decays: Of the averages, for the steps that the move took.
        key: For rounding.
    """
    leaves: list[Array] = jax.tree.leaves(basis)
    structure: Any = jax.tree.structure(basis)
    zero, one = jnp.zeros(1), jnp.ones(1)
    keep, of_move = jnp.concatenate([decays, zero, zero]), jnp.concatenate([-decays, zero, one])
    of_direction = jnp.concatenate([0 * decays, one, zero])
    seeds = jax.random.bits(key, (len(leaves),), jnp.uint32)
    new = []
    parts = zip(leaves, jax.tree.leaves(move), jax.tree.leaves(direction), strict=True)
    for g, (old, m, d) in enumerate(parts):
        a, b, c = (x.reshape(-1, *[1] * m.ndim) for x in (keep, of_move, of_direction))
        stack = jnp.where(a > 0, a * old.astype(jnp.float32), 0.0) + b * m[None] + c * d[None]
        new.append(stack if old.dtype == jnp.float32 else _rounded(stack, seeds[g]))
    return structure.unflatten(new)


def _rounded(leaf: Array, seed: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    kept = (bits + (_hashed(leaf.shape, seed) & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(rounded), rounded, leaf).astype(jnp.bfloat16)


def _hashed(shape: tuple[int, ...], seed: Array) -> Array:
    """Noise of an element from its place (murmur3's finalizer): elementwise, so it lies as the leaf does."""
    factors = (0x9E3779B9, 0x7FEB352D, 0x846CA68B, 0x58B0C2F9, 0x27D4EB2F)
    x = seed
    for axis, factor in zip(range(len(shape)), factors, strict=False):
        x = x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(factor)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def gram(basis: Tree, move: Tree) -> tuple[Array, Array, Array]:
    """`B'B [G, P, P]`, `B'move [G, P]` and `|move|^2 [G]` per group.

    Of a leaf of many rows every fourth is looked at: products of trees are means over elements, and so many
    are enough.
    """

    def one(trees: Array, moved: Array) -> Array:
        rows = jnp.concatenate([_some(trees, 1).astype(jnp.float32), _some(moved, 0)[None]])
        rows = rows.reshape(len(rows), -1)
        return rows @ rows.T

    pairs = zip(jax.tree.leaves(basis), jax.tree.leaves(move), strict=True)
    found = jnp.stack([one(*pair) for pair in pairs])
    return found[:, :-1, :-1], found[:, :-1, -1], found[:, -1, -1]


def _some(leaf: Array, axis: int) -> Array:
    many = leaf.shape[axis:] and leaf.shape[axis] >= 64 and math.prod(leaf.shape[axis:]) >= 2**13
    return jax.lax.slice_in_dim(leaf, 0, None, 4, axis) if many else leaf


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


def jumped(params: Tree, basis: Tree, a: Float[Array, "G P"]) -> Tree:
    """Weights moved by `sum_p a[g, p] B_p`, in their own dtype."""
    leaves: list[Array] = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    moved = []
    for g, (leaf, trees) in enumerate(zip(leaves, jax.tree.leaves(basis), strict=True)):
        move = sum(a[g, p] * trees[p].astype(jnp.float32) for p in range(len(trees)))
        moved.append((leaf.astype(jnp.float32) + move).astype(leaf.dtype))
    return structure.unflatten(moved)
