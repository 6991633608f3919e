"""The decomposed predictor: coarse plus fine, the convex hull, and centroids that nothing moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jasper_parts import CENTROIDS, CLUSTERS, DIM, SMALL, batch, in_torch, subspace
from pydantic import ValidationError

from prime_jax.models.state_dict import state_dict
from prime_jax.models.subspace import SubspaceConfig
from prime_jax.types import Prediction

ROWS = batch()
INPUTS = (ROWS.context, ROWS.query, ROWS.context_mask)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"fine_input": "add"},
    {"routing": "argmax"},
    {"residual": "query"},
    {"residual": "query", "fine_input": "add", "routing": "argmax", "max_delta": 0.2},
]


def named(fields: dict[str, Any]) -> str:
    return "-".join(map(str, fields.values())) or "default"


def modes(**fields: Any) -> list[Prediction]:
    """Of one model: predicting, predicting compiled, and in training with soft and with single choices."""
    model = subspace(**fields)
    graph, params = nnx.split(model)
    compiled = jax.jit(lambda params: nnx.merge(graph, params).details(*INPUTS))(params)
    single = subspace(straight_through=True, **fields)
    training = {"dropout_key": jax.random.key(1), "progress": 0.5}
    return [
        model.details(*INPUTS),
        compiled,
        model.details(*INPUTS, **training),
        single.details(*INPUTS, **training),
    ]


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_equals_torch(fields: dict[str, Any]) -> None:
    """Routing, coarse, fine and the prediction, through every way of reading and weighing."""
    pytest.importorskip("torch")
    model = subspace(**fields)
    steering = jnp.where(ROWS.context_mask, ROWS.context[:, 0], 0.0)
    theirs = in_torch(state_dict(model), ROWS.query, steering, num_layers=2, **fields)
    ours = model.details(*INPUTS)._asdict()
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_prediction_is_coarse_plus_fine_bit_for_bit(fields: dict[str, Any]) -> None:
    for found in modes(**fields):
        np.testing.assert_array_equal(found.embedding, np.asarray(found.coarse) + np.asarray(found.fine))
        np.testing.assert_allclose(jnp.linalg.norm(found.embedding, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_coarse_is_within_the_convex_hull_of_the_centroids(fields: dict[str, Any]) -> None:
    """Its weights are those of a mean, and it is that mean of the exact centroids."""
    for found in modes(**fields):
        weights = np.asarray(found.routing)
        assert weights.min() >= 0
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(found.coarse, weights @ np.asarray(CENTROIDS), atol=1e-6)


def test_a_single_choice_is_one_of_the_centroids() -> None:
    for found in (modes(routing="argmax")[0], modes()[3]):
        chosen = np.argmax(found.routing, axis=1)
        np.testing.assert_array_equal(found.routing, np.eye(CLUSTERS)[chosen])
        np.testing.assert_array_equal(found.coarse, CENTROIDS[chosen])


def test_weights_are_the_softmax_of_the_logits_only_without_noise() -> None:
    predicting, _, training, _ = modes()
    np.testing.assert_allclose(predicting.routing, jax.nn.softmax(predicting.logits, axis=1), atol=1e-6)
    assert float(jnp.abs(training.routing - jax.nn.softmax(training.logits, axis=1)).max()) > 0.1


def test_training_chooses_by_its_key_more_sharply_as_it_goes_on() -> None:
    """Without dropout the key decides the noise of the choice alone; the temperature falls from 1 to 0.1."""
    model = subspace(dropout=0.0)
    one, again, other = (model.details(*INPUTS, dropout_key=jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one.routing, again.routing)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert float(jnp.abs(one.routing - other.routing).max()) > 0.1
    first, last = (
        model.details(*INPUTS, dropout_key=jax.random.key(1), progress=at).routing for at in (0.0, 1.0)
    )
    assert float(first.max(axis=1).mean()) < 0.8 < 0.95 < float(last.max(axis=1).mean())
    log_odds = [np.log(np.asarray(w[0, 0]) / np.asarray(w[0, 1])) for w in (first, last)]
    assert log_odds[1] == pytest.approx(10 * log_odds[0], rel=1e-3)


def test_the_weights_of_the_choice_depend_on_the_steering() -> None:
    """The router reads it too, so taking it away moves the weights."""
    model = subspace()
    moved = model.details(*INPUTS).routing - model.details(ROWS.context[:, :0], ROWS.query).routing
    assert float(jnp.abs(moved[0]).max()) > 1e-2


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_centroids_get_no_gradient_and_are_no_parameters(fields: dict[str, Any]) -> None:
    model = subspace(**fields)
    graph, params = nnx.split(model)

    def loss(params: nnx.State) -> jax.Array:
        found = nnx.merge(graph, params).details(*INPUTS, dropout_key=jax.random.key(0))
        return jnp.sum(found.embedding[:, 0] + found.fine[:, 1] + found.coarse[:, 2])

    slopes = nnx.to_pure_dict(jax.grad(loss)(params))
    np.testing.assert_array_equal(slopes["centroids"], 0.0)
    assert float(jnp.abs(slopes["router"]["choice"]["kernel"]).max()) > 0
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert model.num_params() == sizes - CLUSTERS * DIM


def test_fresh_centroids_are_none() -> None:
    """Until training puts those of the data there, coarse is nothing and fine is everything."""
    found = SubspaceConfig(**SMALL).build(rngs=nnx.Rngs(0)).details(*INPUTS)
    np.testing.assert_array_equal(found.coarse, 0.0)
    np.testing.assert_array_equal(found.fine, found.embedding)
    assert found.routing.shape == (6, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dim": 7}, "input_dim 8 must equal output_dim 7"),
        ({"gumbel_start": 0.1, "gumbel_end": 0.5}, r"gumbel_end 0\.5 is above gumbel_start 0\.1"),
        ({"gumbel_end": 0.0}, "greater than 0"),
        ({"num_subspaces": 1}, "greater than or equal to 2"),
        ({"routing": "top2"}, "'softmax' or 'argmax'"),
        ({"fine_input": "sum"}, "'concat' or 'add'"),
        ({"max_delta": 0.1}, "residual is 'none'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SubspaceConfig(**(SMALL | fields))
