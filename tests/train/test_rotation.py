"""Turned batches: uniform rotations, undone in the answer, the same on many devices and in many turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import DIM, batch, run, shared

from prime_jax.config import MeshConfig, read_config
from prime_jax.errors import ConfigError
from prime_jax.train.rotation import random_rotation
from prime_jax.train.step import StepPlan

TURNED = StepPlan(10, rotation=1.0)


def test_is_orthogonal_and_different_each_time() -> None:
    first, second = (random_rotation(jax.random.key(seed), 16, 1.0) for seed in (0, 1))
    for turned in (first, second):
        np.testing.assert_allclose(turned @ turned.T, np.eye(16), atol=1e-5)
    assert jnp.abs(first - second).max() > 0.1


def test_in_the_share_of_draws_that_is_asked_for() -> None:
    drawn = jax.vmap(lambda key: random_rotation(key, 4, 0.3))(jax.random.split(jax.random.key(0), 1000))
    plain = np.isclose(drawn, np.eye(4)).all(axis=(1, 2))
    assert abs(plain.mean() - 0.7) < 0.05


def test_is_uniform() -> None:
    """Every entry of a uniform rotation has mean 0 and variance 1 / D."""
    drawn = jax.vmap(lambda key: random_rotation(key, 5, 1.0))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose((drawn**2).mean(axis=0), 0.2, atol=0.02)


def test_a_baseline_does_not_notice_it() -> None:
    """With its gate shut the model adds turns to the query, which commutes with every rotation."""
    plain = run(1, plan=StepPlan(10), residual="copy")[1][0]["loss"]
    turned = run(1, plan=TURNED, residual="copy")[1][0]["loss"]
    assert turned == pytest.approx(plain, rel=1e-5)


def test_a_model_of_its_own_does_and_the_targets_are_turned_back() -> None:
    plain = run(1, plan=StepPlan(10))[1][0]["loss"]
    turned = run(1, plan=TURNED)[1][0]["loss"]
    assert abs(turned - plain) > 1e-3


@pytest.mark.parametrize(
    ("mesh", "plan"),
    [(MeshConfig(data=4), TURNED), (None, StepPlan(10, rotation=1.0, micro_batch=4))],
)
def test_devices_and_turns_change_nothing(mesh: MeshConfig | None, plan: StepPlan) -> None:
    whole, metrics = shared(plan=TURNED)
    other, others = run(2, mesh=mesh, plan=plan)
    for left, right in zip(metrics, others, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    for left, right in zip(jax.tree.leaves(whole.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_needs_queries_and_answers_in_one_space() -> None:
    assert batch(0).query.shape[1] == DIM
    with pytest.raises(ConfigError, match=r"must equal model\.output_dim"):
        read_config(None, ["--train.rotation", "0.5", "--model.output-dim", "512"])
