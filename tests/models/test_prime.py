"""The embedding predictor: the cases the requirement names, as invariants with numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from prime_jax.errors import PredictorError
from prime_jax.models.prime import COPY_DECAY, COPY_WEIGHT, EmbeddingPredictor, PredictorConfig
from prime_jax.nn.remat import Remat

MODES = ("full", "prefix", "causal")


def small(**fields: object) -> PredictorConfig:
    shape = {"input_dim": 12, "hidden_dim": 128, "output_dim": 12, "num_layers": 2, "num_heads": 4}
    shape |= {"max_context_length": 4, "dropout": 0.2}
    return PredictorConfig(**(shape | fields))


def make(seed: int = 0, **fields: object) -> EmbeddingPredictor:
    model = EmbeddingPredictor(small(**fields), rngs=nnx.Rngs(seed))
    if fields.get("residual", "none") != "none":
        model.residual_gate[...] = jnp.float32(0.7)
    return model


def inputs(batch: int = 3, turns: int = 4, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(batch, turns, 12)).astype(np.float32)
    return jnp.asarray(context), jnp.asarray(rng.normal(size=(batch, 12)).astype(np.float32))


def test_forward_pass_shape_of_a_rectangular_model() -> None:
    """FR-PRED-001, 005: B x N x D and B x D in, B x E out."""
    model = EmbeddingPredictor(small(output_dim=7), rngs=nnx.Rngs(0))
    assert model(*inputs(5, 3)).shape == (5, 7)


@pytest.mark.parametrize("turns", range(5))
def test_output_normalized(turns: int) -> None:
    """FR-PRED-006, whatever the scale of the input."""
    context, query = inputs(turns=turns)
    np.testing.assert_allclose(jnp.linalg.norm(make()(100 * context, 100 * query), axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residual", ["none", "query", "copy", "linear"])
def test_padding_and_neighbours_change_nothing(mode: str, residual: str) -> None:
    """A row alone without padding equals the row in a batch, padded on either side with garbage."""
    model = make(context_attention=mode, residual=residual)
    context, query = inputs(turns=2)
    garbage = jnp.full((3, 1, 12), jnp.nan)
    padded = jnp.concatenate([garbage, context[:, :1], 1e6 * jnp.ones_like(garbage), context[:, 1:]], axis=1)
    mask = jnp.array([[False, True, False, True]] * 3)
    together = model(padded, query, mask)
    for row in range(3):
        alone = model(context[row : row + 1], query[row : row + 1])[0]
        np.testing.assert_allclose(together[row], alone, atol=1e-5)


def test_no_context_at_all() -> None:
    """The first turn of a conversation: N = 0, and N = 4 with nothing real, are the same."""
    model = make()
    context, query = inputs()
    np.testing.assert_allclose(
        model(context[:, :0], query), model(context, query, jnp.zeros((3, 4), bool)), atol=1e-6
    )


def test_order_of_turns_matters() -> None:
    context, query = inputs()
    difference = jnp.abs(make()(context, query) - make()(context[:, ::-1], query))
    assert float(difference.max()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_who_influences_whom_by_gradient(mode: str) -> None:
    """The turns' states before the last layer depend on exactly the tokens the mode allows."""
    model = make(context_attention=mode)
    context, query = inputs(batch=1, turns=4)

    def turns_after_one_layer(context: jax.Array, query: jax.Array) -> jax.Array:
        return model._transform(context, query, jnp.ones((1, 4), bool), None, "none")[1][0].sum(axis=-1)

    by_turn, by_query = jax.jacobian(turns_after_one_layer, argnums=(0, 1))(context, query)
    seen = np.asarray(jnp.abs(by_turn).sum(axis=(1, 3)) > 0)  # [state of turn, turn]
    sees_query = np.asarray(jnp.abs(by_query).sum(axis=(1, 2)) > 0)
    expected = np.tril(np.ones((4, 4), bool)) if mode == "causal" else np.ones((4, 4), bool)
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(sees_query, mode == "full")


def test_gradient_flow() -> None:
    """Every parameter and every input has a gradient that is not zero everywhere."""
    model = make(residual="linear", dropout=0.0)
    graph, params = nnx.split(model)
    target = jnp.asarray(np.random.default_rng(5).normal(size=(3, 12)).astype(np.float32))

    def loss(params: nnx.State, context: jax.Array, query: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(context, query) * target)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(params, *inputs())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("residual", ["none", "linear"])
def test_gradient_by_finite_differences(residual: str) -> None:
    """Along random unit directions in parameter space, central differences give the same slope."""
    graph, params = nnx.split(make(residual=residual, dropout=0.0))
    flat, unflatten = ravel_pytree(params)
    context, query = inputs(batch=2)
    rng = np.random.default_rng(5)
    target = jnp.asarray(rng.normal(size=(2, 12)).astype(np.float32))

    @jax.jit
    def loss(flat: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, unflatten(flat))(context, query) * target)

    gradient = jax.grad(loss)(flat)
    random = rng.normal(size=(4, flat.size)).astype(np.float32)
    for direction in [gradient, *jnp.asarray(random)]:
        direction = direction / jnp.linalg.norm(direction)
        slope = (loss(flat + 0.01 * direction) - loss(flat - 0.01 * direction)) / 0.02
        assert float(slope) == pytest.approx(float(gradient @ direction), rel=1e-2, abs=2e-3)


@pytest.mark.parametrize("policy", ["blocks", "dots"])
def test_remat_changes_nothing_but_memory(policy: Remat) -> None:
    """FR-PRED-010: same loss and gradient, with dropout on."""
    graph, params = nnx.split(make())
    context, query = inputs()

    def loss(params: nnx.State, remat: Remat) -> jax.Array:
        out = nnx.merge(graph, params)(context, query, dropout_key=jax.random.key(1), remat=remat)
        return out[:, 0].sum()

    plain, again = (jax.value_and_grad(loss)(params, remat) for remat in ("none", policy))
    for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5, rtol=1e-5)


def test_dropout_follows_its_key_and_only_its_key() -> None:
    model, (context, query) = make(), inputs()
    one, same, other = (model(context, query, dropout_key=jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-3
    np.testing.assert_array_equal(model(context, query), model(context, query))


def test_same_seed_same_weights() -> None:
    left, right, other = (jax.tree.leaves(nnx.state(make(seed))) for seed in (0, 0, 1))
    assert all(bool((a == b).all()) for a, b in zip(left, right, strict=True))
    assert not all(bool((a == b).all()) for a, b in zip(left, other, strict=True))


def test_bfloat16_products_stay_close_and_answer_in_float32() -> None:
    config, (context, query) = small(), inputs()
    exact, rough = (
        EmbeddingPredictor(config, dtype=dtype, rngs=nnx.Rngs(0))(context, query)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(exact - rough).max()) > 0
    assert float(jnp.sum(exact * rough, axis=-1).min()) > 0.999


def test_initial_weights() -> None:
    """Xavier-uniform matrices (the fused projection as one matrix), zero biases, N(0, 0.02) tokens."""
    model = EmbeddingPredictor(PredictorConfig(hidden_dim=256, input_dim=64, num_layers=1), rngs=nnx.Rngs(0))
    fused = model.layers[0].attention.in_proj
    bound = np.sqrt(6 / (256 + 3 * 256))
    assert 0.99 * bound < float(jnp.abs(fused.kernel[...]).max()) <= bound
    assert float(jnp.abs(fused.bias[...]).max()) == 0
    assert float(model.pos_embedding[...].std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.pred_token[...].std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("residual", ["query", "copy", "linear"])
def test_training_starts_exactly_at_a_baseline(residual: str) -> None:
    """Gate zero: the plain query, or the query plus recency-weighted turns, whatever the other weights."""
    model = EmbeddingPredictor(small(residual=residual), rngs=nnx.Rngs(0))
    context, query = inputs()
    mask = jnp.array([[True, True, True, True], [True, True, False, False], [False] * 4])
    expected = np.array(query)
    if residual != "query":
        for row, turns in enumerate([4, 2, 0]):
            for age in range(turns):
                expected[row] += COPY_WEIGHT * COPY_DECAY**age * np.asarray(context[row, turns - 1 - age])
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(model(context, query, mask), expected, atol=1e-6)


def test_max_delta_caps_what_is_added() -> None:
    """With a cap of 0.1 on a unit query the prediction stays within 0.1 of the query's direction."""
    context, query = inputs()
    query = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    free, capped = (make(residual="query", max_delta=cap)(context, query) for cap in (None, 0.1))
    sine = jnp.sqrt(1 - jnp.sum(capped * query, axis=-1) ** 2)
    assert float(sine.max()) <= 0.1 + 1e-5
    assert float(jnp.sum(free * query, axis=-1).min()) < float(jnp.sum(capped * query, axis=-1).min())


def test_parameter_count_of_the_default() -> None:
    """About 206M (plan, appendix B): projections, 12 positions, 4 layers of 12 H^2 + 13 H, final norm."""
    H, D, E = 2048, 1024, 1024
    expected = 2 * (D * H + H) + (H * E + E) + H + 12 * H + 4 * (12 * H * H + 13 * H) + 2 * H
    model = nnx.eval_shape(lambda: EmbeddingPredictor(PredictorConfig(), rngs=nnx.Rngs(0)))
    assert model.num_params() == expected == 207_760_384


@pytest.mark.parametrize(
    ("context", "query", "mask", "message"),
    [
        ((4, 3, 10), (4, 12), None, "dimension 10, the model takes 12"),
        ((4, 3, 12), (2, 12), None, r"query has shape \(2, 12\), expected \(4, 12\)"),
        ((4, 3, 12), (4, 11), None, r"query has shape \(4, 11\)"),
        ((4, 5, 12), (4, 12), None, "5 turns, the model takes at most 4"),
        ((4, 12), (4, 12), None, "must have shape"),
        ((4, 3, 12), (4, 12), (4, 2), "context_mask has shape"),
    ],
)
def test_bad_shapes_are_named(
    context: tuple, query: tuple, mask: tuple | None, message: str, as_users_run_it: None
) -> None:
    arrays = (jnp.zeros(context), jnp.zeros(query), None if mask is None else jnp.ones(mask, bool))
    with pytest.raises(PredictorError, match=message):
        make()(*arrays)


def test_fields_that_contradict_each_other_are_refused() -> None:
    for fields, message in [
        ({"num_heads": 3}, "not divisible"),
        ({"residual": "query", "output_dim": 8}, "must equal output_dim"),
        ({"max_delta": 1.0}, "residual is 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(**fields)
