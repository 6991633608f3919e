"""Distances to what a prediction should be: by hand and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.losses.alignment import centroid_logits, cross_entropy, smooth_l1

torch = pytest.importorskip("torch")


def draws(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def test_smooth_l1_by_hand() -> None:
    """Coordinates 0.5, 2, 1 and 0 apart: 0.125, 1.5, 0.5 and 0, on average 0.53125."""
    value = smooth_l1(jnp.array([[0.5, -2.0, 1.0, 3.0]]), jnp.array([[0.0, 0.0, 0.0, 3.0]]))
    np.testing.assert_allclose(value, [0.53125], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.25, 1.0, 3.0])
def test_smooth_l1_and_its_gradient_equal_torch(beta: float) -> None:
    left, right = draws(5, 7), draws(5, 7, seed=1)
    left[0, 0] = right[0, 0] + beta  # exactly on the seam
    value, gradient = jax.value_and_grad(lambda x: smooth_l1(x, jnp.asarray(right), beta).sum())(
        jnp.asarray(left)
    )
    there = torch.tensor(left, requires_grad=True)
    theirs = torch.nn.functional.smooth_l1_loss(there, torch.tensor(right), beta=beta, reduction="none")
    theirs.mean(dim=1).sum().backward()
    np.testing.assert_allclose(value, theirs.mean(dim=1).sum().item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, there.grad.numpy(), atol=1e-6)


def test_cross_entropy_by_hand() -> None:
    """Odds of 1 to 3: the right class has a probability of 3/4; nothing known about four: log 4."""
    np.testing.assert_allclose(
        cross_entropy(jnp.log(jnp.array([[1.0, 3.0]])), jnp.array([1])), [np.log(4 / 3)], rtol=1e-6
    )
    np.testing.assert_allclose(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])), [np.log(4)], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_equals_torch(scale: float) -> None:
    logits, label = draws(6, 5, scale=scale), np.array([0, 4, 2, 2, 1, 3])
    theirs = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(label), reduction="none")
    ours = cross_entropy(jnp.asarray(logits), jnp.asarray(label))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_centroid_logits_by_hand() -> None:
    """Lengths do not count: along the first centroid, across the second, against the third, over 0.1."""
    centroids = jnp.array([[3.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    np.testing.assert_allclose(
        centroid_logits(jnp.array([[5.0, 0.0]]), centroids, 0.1), [[10.0, 0.0, -10.0]], atol=1e-5
    )


def test_centroid_loss_equals_torch() -> None:
    predicted, centroids, label = draws(6, 8), draws(3, 8, seed=1), np.array([0, 2, 1, 1, 0, 2])
    ours = cross_entropy(
        centroid_logits(jnp.asarray(predicted), jnp.asarray(centroids), 0.1), jnp.asarray(label)
    )
    normalize = torch.nn.functional.normalize
    logits = normalize(torch.tensor(predicted)) @ normalize(torch.tensor(centroids)).T / 0.1
    theirs = torch.nn.functional.cross_entropy(logits, torch.tensor(label), reduction="none")
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)
