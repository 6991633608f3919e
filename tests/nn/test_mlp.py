"""The stack of blocks against torch; its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prime_jax.nn.mlp import MLP

torch = pytest.importorskip("torch")

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32))


def make(blocks: int = 2, rate: float = 0.0) -> MLP:
    """With norms that do something."""
    stack = MLP(5, 16, blocks, rate, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for index, norm in enumerate(stack.norms):
        key = jax.random.key(index)
        norm.scale[...] = 1 + 0.3 * jax.random.normal(key, (16,))
        norm.bias[...] = 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (16,))
    return stack


@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_torch(blocks: int) -> None:
    """Linear, exact GELU, LayerNorm: in this order, the last block too."""
    stack, layers = make(blocks), []
    for linear, norm in zip(stack.linears, stack.norms, strict=True):
        there = torch.nn.Linear(linear.kernel.shape[0], 16), torch.nn.GELU(), torch.nn.LayerNorm(16)
        there[0].weight.data = torch.tensor(np.asarray(linear.kernel[...]).T)
        there[0].bias.data = torch.tensor(np.asarray(linear.bias[...]))
        there[2].weight.data = torch.tensor(np.asarray(norm.scale[...]))
        there[2].bias.data = torch.tensor(np.asarray(norm.bias[...]))
        layers += there
    theirs = torch.nn.Sequential(*layers)(torch.tensor(np.asarray(X)))
    assert len(layers) == 3 * blocks
    np.testing.assert_allclose(stack(X), theirs.detach().numpy(), atol=1e-5)


def test_dropout_needs_a_key_and_follows_it() -> None:
    stack, plain = make(rate=0.5), make(rate=0.0)
    np.testing.assert_array_equal(stack(X), plain(X))
    one, again, other = (stack(X, jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 0.1
    np.testing.assert_array_equal(plain(X, jax.random.key(1)), plain(X))


def test_every_block_drops_for_itself() -> None:
    """The last block's share of zeros is the rate, and its pattern is not the first block's."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(400, 5)).astype(np.float32))
    first, second = (make(blocks, rate=0.5)(x, jax.random.key(3)) == 0 for blocks in (1, 2))
    assert float(second.mean()) == pytest.approx(0.5, abs=0.03)
    assert float((first == second).mean()) == pytest.approx(0.5, abs=0.03)
