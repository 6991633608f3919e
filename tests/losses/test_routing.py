"""What a router learns from: by hand, against torch, and that every part of it reaches the router."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jasper_parts import CENTROIDS, batch, subspace

from prime_jax.losses.jasper import COMPONENTS, ROUTING_COMPONENTS, JasperLossConfig, JasperObjective
from prime_jax.losses.objective import Objective
from prime_jax.losses.routing import entropy, entropy_loss, entropy_target, residual_hinge
from prime_jax.nn.online_encoder import initial_encoder

torch = pytest.importorskip("torch")

WEIGHTS = np.random.default_rng(0).dirichlet(np.full(5, 0.7), size=6).astype(np.float32)


def test_entropy_by_hand() -> None:
    """A half and two quarters: 1.5 log 2; all alike: log 4; one choice: 0."""
    weights = jnp.array([[0.5, 0.25, 0.25, 0.0], [0.25] * 4, [0.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(entropy(weights), [1.5 * np.log(2), np.log(4), 0.0], rtol=1e-6)


def test_entropy_loss_equals_torch() -> None:
    theirs = torch.distributions.Categorical(probs=torch.tensor(WEIGHTS)).entropy()
    np.testing.assert_allclose(entropy(jnp.asarray(WEIGHTS)), theirs.numpy(), rtol=1e-5)
    ours = entropy_loss(jnp.asarray(WEIGHTS), 0.4)
    np.testing.assert_allclose(ours, ((theirs - 0.4) ** 2).numpy(), rtol=1e-4, atol=1e-6)


def test_entropy_has_a_finite_gradient_at_a_single_choice() -> None:
    assert np.isfinite(jax.grad(lambda w: entropy_loss(w, 1.0).sum())(jnp.eye(3))).all()


@pytest.mark.parametrize("subspaces", [2, 32])
def test_entropy_target_falls_from_everything_to_nearly_nothing(subspaces: int) -> None:
    """Log K at first, 0.1 after 20 epochs and from then on, halfway between at 10."""
    start = np.log(subspaces)
    expected = {0.0: start, 10.0: (start + 0.1) / 2, 20.0: 0.1, 50.0: 0.1}
    for epoch, target in expected.items():
        np.testing.assert_allclose(entropy_target(epoch, subspaces), target, rtol=1e-5)
    np.testing.assert_allclose(
        entropy_target(1.0, subspaces, epochs=2.0, end=0.3), (start + 0.3) / 2, rtol=1e-5
    )


def test_residual_hinge_by_hand() -> None:
    """A norm of 5: 3 above a margin of 2, free below one of 6, where there is no gradient either."""
    fine = jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(residual_hinge(fine, 2.0), [3.0], rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: residual_hinge(x, 2.0).sum())(fine), [[0.6, 0.8]], rtol=1e-6
    )
    assert residual_hinge(fine, 6.0) == 0.0
    np.testing.assert_array_equal(jax.grad(lambda x: residual_hinge(x, 6.0).sum())(fine), 0.0)
    assert np.isfinite(jax.grad(lambda x: residual_hinge(x, 0.0).sum())(jnp.zeros((1, 2)))).all()


def test_residual_hinge_equals_torch() -> None:
    fine = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    theirs = torch.relu(torch.linalg.vector_norm(torch.tensor(fine), dim=1) - 1.0).numpy()
    assert 0 < (theirs > 0).sum() < 6
    np.testing.assert_allclose(residual_hinge(jnp.asarray(fine), 1.0), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("name", ROUTING_COMPONENTS)
def test_every_routing_loss_alone_teaches_the_router(name: str, straight_through: bool) -> None:
    """The public original detaches what these losses look at, so they teach it nothing.

    One of the other losses must have a weight; InfoNCE has one of 1e-9, which alone moves nothing.
    """
    graph, params = nnx.split(subspace(straight_through=straight_through))
    off = dict.fromkeys((*COMPONENTS, *ROUTING_COMPONENTS), 0.0)
    rows, trained = batch(), {"online_encoder": initial_encoder(jax.random.key(0), 8)}

    def gradient(**weights: float) -> Any:
        objective = JasperObjective(Objective(), JasperLossConfig(**(off | weights)), CENTROIDS)

        def loss(params: Any) -> jax.Array:
            found = nnx.merge(graph, params).details(
                rows.context, rows.query, rows.context_mask, dropout_key=jax.random.key(1), progress=0.0
            )
            return objective(found, rows, trained, epoch=5.0)[0]

        return nnx.to_pure_dict(jax.grad(loss)(params))

    alone, without = gradient(contrastive=1e-9, **{name: 1.0}), gradient(contrastive=1e-9)
    for path, leaf in jax.tree_util.tree_leaves_with_path(alone["router"]):
        assert float(jnp.abs(leaf).max()) > 1e-5, jax.tree_util.keystr(path)
    for leaf in jax.tree.leaves(without["router"]):
        assert float(jnp.abs(leaf).max()) < 1e-7
    assert not alone["centroids"].any()
