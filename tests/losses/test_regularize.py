"""VICReg: by hand, against the published formulas in torch, and that it does prevent a collapse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jasper_parts import CENTROIDS, DIM, jasper, unit_rows

from prime_jax.losses.jasper import ONLINE_ENCODER, JasperLossConfig, JasperObjective
from prime_jax.losses.objective import Objective, spread
from prime_jax.losses.regularize import off_diagonal_covariance, variance_hinge, vicreg
from prime_jax.nn.online_encoder import encode, initial_encoder
from prime_jax.nn.target_head import ema
from prime_jax.train.validate import effective_rank
from prime_jax.types import Batch

torch = pytest.importorskip("torch")

TWO = jnp.array([[0.0, 0.0], [2.0, 2.0]])  # variance 2 in both coordinates, covariance 2


def test_variance_by_hand() -> None:
    """A deviation of sqrt(2) is enough for a gamma of 1, and 2 - sqrt(2.0001) short of one of 2."""
    assert variance_hinge(TWO) == 0.0
    np.testing.assert_allclose(variance_hinge(TWO, 2.0), 2 - np.sqrt(2.0001), rtol=1e-5)


def test_covariance_by_hand() -> None:
    """Two entries off the diagonal, 2 each: (4 + 4) / 2."""
    np.testing.assert_allclose(off_diagonal_covariance(TWO), 4.0, rtol=1e-6)
    np.testing.assert_allclose(off_diagonal_covariance(TWO * jnp.array([1.0, 0.0])), 0.0, atol=1e-7)


def test_collapsed_rows_are_pushed_apart_by_a_finite_gradient() -> None:
    """All rows the same: 1 - sqrt(1e-4); nearly the same: a gradient that drives them apart."""
    np.testing.assert_allclose(variance_hinge(jnp.ones((4, 3))), 0.99, rtol=1e-5)
    assert np.isfinite(jax.grad(variance_hinge)(jnp.ones((4, 3)))).all()
    near = jnp.array([[0.01], [-0.01]])
    slope = jax.grad(variance_hinge)(near)
    assert slope[0, 0] < 0 < slope[1, 0]


def test_equals_the_published_formulas() -> None:
    """arXiv 2105.04906, equations 1 to 4; invariance is the mean over coordinates, as its code has it."""

    def variance(x: Any) -> Any:
        return torch.relu(1.0 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()

    def covariance(x: Any) -> Any:
        matrix = torch.cov(x.T)
        return (matrix - torch.diag(torch.diag(matrix))).pow(2).sum() / x.shape[1]

    rng = np.random.default_rng(0)
    left, right = (0.8 * rng.normal(size=(2, 6, 5))).astype(np.float32)
    ours, slope = jax.value_and_grad(lambda x: jnp.sum(jnp.stack(vicreg(x, jnp.asarray(right)))))(
        jnp.asarray(left)
    )
    a, b = torch.tensor(left, requires_grad=True), torch.tensor(right)
    theirs = (
        variance(a) + variance(b),
        torch.nn.functional.mse_loss(a, b),
        covariance(a) + covariance(b),
    )
    sum(theirs).backward()
    for mine, other in zip(vicreg(jnp.asarray(left), jnp.asarray(right)), theirs, strict=True):
        np.testing.assert_allclose(mine, other.item(), rtol=1e-5)
        assert other.item() > 0.01
    np.testing.assert_allclose(ours, sum(theirs).item(), rtol=1e-5)
    np.testing.assert_allclose(slope, a.grad.numpy(), atol=1e-6)


def test_one_row_has_no_variance_to_speak_of() -> None:
    """The public original gives NaN here."""
    row = jnp.array([[0.3, -0.2]])
    assert [float(value) for value in vicreg(row, 2 * row)] == [0.0, pytest.approx(0.065), 0.0]
    slope = jax.grad(lambda x: jnp.sum(jnp.stack(vicreg(x, jnp.ones((1, 2))))))(row)
    np.testing.assert_allclose(slope, row - 1, rtol=1e-6)


def test_gamma_is_in_reach_at_the_norm_of_the_encoder_and_not_at_norm_1() -> None:
    """Unit vectors spread evenly over 64 dimensions deviate by 1/8: the hinge would never let go of them."""
    even = unit_rows(0, 2000, 64)
    assert float(variance_hinge(even)) == pytest.approx(1 - 1 / 8, abs=0.01)
    assert float(variance_hinge(encode(initial_encoder(jax.random.key(0), 64), even))) < 0.02


def trained(vicreg_weight: float, signal: float, steps: int = 120) -> tuple[jax.Array, float]:
    """Predictions and their effective rank, after training on the alignment to the slow encoder.

    Every batch is new, so that nothing can be learned by heart: of a target, only its place on one line
    follows from the question, the rest is noise. The best guess of the rest is a constant.
    """
    objective = JasperObjective(
        Objective(),
        JasperLossConfig(contrastive=0.0, jepa=1.0, centroid=0.0, vicreg=vicreg_weight),
        CENTROIDS,
    )
    graph, model = nnx.split(jasper(dropout=0.0))
    params = {"model": model, ONLINE_ENCODER: initial_encoder(jax.random.key(0), DIM)}
    optimizer = optax.adam(1e-2)
    line = unit_rows(3, 1, DIM)

    def draw(key: jax.Array, rows: int = 64) -> Batch:
        query, noise = jax.random.normal(key, (2, rows, DIM))
        target = signal * query[:, :1] * line + noise
        target = target / jnp.linalg.norm(target, axis=1, keepdims=True)
        ids = jnp.arange(rows)
        return Batch(
            query[:, None],
            ids[:, None] < 0,
            query,
            target,
            ids,
            ids[:, None],
            ids,
            cluster=jnp.zeros_like(ids),
        )

    @jax.jit
    def step(params: Any, state: Any, average: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        batch = draw(key)

        def loss(params: Any) -> jax.Array:
            found = nnx.merge(graph, params["model"]).details(batch.context, batch.query, batch.context_mask)
            return objective(found, batch, {ONLINE_ENCODER: params[ONLINE_ENCODER]}, average=average)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
        follow = jax.tree.map(lambda a, b: ema(a, b, jnp.float32(0.9)), average, params[ONLINE_ENCODER])
        return params, state, follow

    state, average = optimizer.init(params), params[ONLINE_ENCODER]
    for number in range(steps):
        params, state, average = step(params, state, average, jax.random.key(number))
    seen = draw(jax.random.key(10**6), 256)
    predicted = nnx.merge(graph, params["model"])(seen.context, seen.query, seen.context_mask)
    return predicted, effective_rank(np.asarray(predicted))


def test_vicreg_prevents_the_collapse_to_a_point() -> None:
    """Nothing to be known: without VICReg all predictions become the same one."""
    spreads = [float(spread(trained(weight, 0.0)[0])["spread"]) for weight in (0.0, 1.0)]
    assert spreads[0] < 0.15
    assert spreads[1] > 0.8


def test_vicreg_prevents_the_collapse_to_a_line() -> None:
    """One direction to be known: without VICReg predictions lie along it."""
    ranks = [trained(weight, 1.0)[1] for weight in (0.0, 1.0)]
    assert ranks[0] < 2.7
    assert ranks[1] > 4.5
