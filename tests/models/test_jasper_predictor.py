"""The plain JASPER predictor: its numbers, its inputs, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jasper_parts import DIM, SMALL, batch, in_torch, jasper, subspace, unit_rows
from pydantic import ValidationError

from prime_jax.errors import CheckpointError, PredictorError
from prime_jax.models import KINDS, kind_of, model_config
from prime_jax.models.jasper import JasperConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.state_dict import load_state_dict, state_dict
from prime_jax.models.subspace import SubspaceConfig

MAKERS = [jasper, subspace]
ROWS = batch()
INPUTS = (ROWS.context, ROWS.query, ROWS.context_mask)
RESIDUALS: list[dict[str, Any]] = [{}, {"residual": "query"}, {"residual": "query", "max_delta": 0.1}]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("fields", RESIDUALS, ids=["none", "query", "capped"])
def test_equals_torch(make: Any, fields: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    model = make(**fields)
    steering = jnp.where(ROWS.context_mask, ROWS.context[:, 0], 0.0)
    theirs = in_torch(state_dict(model), ROWS.query, steering, num_layers=2, **fields)
    np.testing.assert_allclose(model(*INPUTS), theirs["embedding"], atol=1e-5)


def test_a_rectangular_model() -> None:
    """384 in, 7 out: only the residual and the centroids need D = E."""
    model = jasper(output_dim=7)
    assert model(*INPUTS).shape == (6, 7)
    np.testing.assert_allclose(jnp.linalg.norm(model(*INPUTS), axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("fields", RESIDUALS, ids=["none", "query", "capped"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_output_is_of_unit_norm(make: Any, fields: dict[str, Any], scale: float) -> None:
    answers = make(**fields)(scale * ROWS.context, scale * ROWS.query, ROWS.context_mask)
    np.testing.assert_allclose(jnp.linalg.norm(answers, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_no_steering_said_in_four_ways(make: Any) -> None:
    """Zero, masked (whatever stands there), no turn at all, and no turn with its empty mask."""
    model = make()
    nothing = [
        model(jnp.zeros((6, 1, DIM)), ROWS.query),
        model(jnp.full((6, 1, DIM), jnp.nan), ROWS.query, jnp.zeros((6, 1), bool)),
        model(jnp.zeros((6, 0, DIM)), ROWS.query),
        model(jnp.zeros((6, 0, DIM)), ROWS.query, jnp.zeros((6, 0), bool)),
    ]
    for answers in nothing[1:]:
        np.testing.assert_array_equal(answers, nothing[0])
    given = np.abs(np.asarray(model(*INPUTS) - nothing[0])).max(axis=1)
    assert given[ROWS.context_mask[:, 0]].min() > 1e-2  # rows with steering feel it
    assert given[~ROWS.context_mask[:, 0]].max() < 1e-6


@pytest.mark.parametrize("make", MAKERS)
def test_rows_do_not_know_each_other(make: Any) -> None:
    model = make()
    together = model(*INPUTS)
    for row in range(6):
        alone = model(*(array[row : row + 1] for array in INPUTS))
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_training_follows_its_key_and_predicting_needs_none(make: Any) -> None:
    model = make(dropout=0.3)
    one, again, other = (model(*INPUTS, dropout_key=jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-2
    np.testing.assert_array_equal(model(*INPUTS), model(*INPUTS))


@pytest.mark.parametrize("make", MAKERS)
def test_a_residual_starts_at_the_question(make: Any) -> None:
    """Gates are zero, whatever the other weights; and all of them can leave zero."""
    config = type(make().config)(**SMALL, residual="query")
    model = config.build(rngs=nnx.Rngs(0))
    if isinstance(config, SubspaceConfig):
        model.centroids[...] = unit_rows(3, config.num_subspaces, DIM)
    np.testing.assert_allclose(model(3 * ROWS.context, 5 * ROWS.query), ROWS.query, atol=1e-6)
    graph, params = nnx.split(model)
    slopes = nnx.to_pure_dict(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(*INPUTS) * ROWS.target))(params))
    assert all(abs(float(slope)) > 1e-3 for name, slope in slopes.items() if name.endswith("gate"))


def test_max_delta_caps_what_is_added() -> None:
    """Within 0.1 of a unit question: the sine of the angle is at most 0.1."""
    free, capped = (jasper(residual="query", max_delta=cap)(*INPUTS) for cap in (None, 0.1))
    sines = [jnp.sqrt(1 - jnp.sum(found * ROWS.query, axis=1) ** 2) for found in (free, capped)]
    assert float(sines[1].max()) <= 0.1 + 1e-5
    assert float(sines[0].min()) > 0.1


@pytest.mark.parametrize("make", MAKERS)
def test_every_weight_and_input_has_a_gradient(make: Any) -> None:
    graph, params = nnx.split(make(residual="query", dropout=0.0))

    def loss(params: nnx.State, context: jax.Array, query: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(context, query) * ROWS.target)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(params, ROWS.context, ROWS.query)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert (float(jnp.abs(leaf).max()) > 1e-5) == ("centroids" not in name), name


def test_number_of_parameters_by_hand() -> None:
    """Per block a matrix, a bias and a norm; encoders 8-16-16, the head 32-16-16, out 16-8."""
    encoder = (8 * 16 + 16 + 32) + (16 * 16 + 16 + 32)
    head = (32 * 16 + 16 + 32) + (16 * 16 + 16 + 32)
    assert jasper().num_params() == 2 * encoder + head + 16 * 8 + 8
    assert jasper(residual="query").num_params() == jasper().num_params() + 1


def test_bfloat16_products_stay_close_and_answer_in_float32() -> None:
    config = jasper().config
    exact, rough = (
        config.build(dtype=dtype, rngs=nnx.Rngs(0))(*INPUTS) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(exact - rough).max()) > 0
    assert float(jnp.sum(exact * rough, axis=1).min()) > 0.999


@pytest.mark.parametrize(
    ("context", "query", "mask", "message"),
    [
        ((4, 1, 7), (4, 8), None, "expected dimension 8"),
        ((4, 1, 8), (4, 7), None, "expected dimension 8"),
        ((4, 1, 8), (3, 8), None, "as many rows in both"),
        ((4, 2, 8), (4, 8), None, "2 turns, but this model takes one steering vector"),
        ((4, 8), (4, 8), None, "must have shape"),
        ((4, 1, 8), (4, 8), (4, 2), r"context_mask has shape \(4, 2\), expected \(4, 1\)"),
    ],
)
@pytest.mark.parametrize("make", MAKERS)
def test_bad_shapes_are_named(
    make: Any, context: tuple, query: tuple, mask: tuple | None, message: str, as_users_run_it: None
) -> None:
    arrays = (jnp.zeros(context), jnp.zeros(query), None if mask is None else jnp.ones(mask, bool))
    with pytest.raises(PredictorError, match=message):
        make()(*arrays)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"residual": "query", "output_dim": 7}, "input_dim 8 must equal output_dim 7"),
        ({"max_delta": 1.0}, "residual is 'none'"),
        ({"residual": "query", "max_delta": 0.0}, "greater than 0"),
        ({"residual": "copy"}, "'none' or 'query'"),
        ({"num_layers": 0}, "greater than or equal to 1"),
        ({"num_heads": 2}, "not permitted"),
        ({"kind": "prime"}, "'jasper'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JasperConfig(**(SMALL | fields))


def test_a_stored_config_is_that_of_its_kind() -> None:
    """Without a word of its kind it is PRIME's, as those stored before there were kinds."""
    for config in (PredictorConfig(), JasperConfig(hidden_dim=64), SubspaceConfig(num_subspaces=5)):
        assert model_config(config.model_dump()) == config
        assert kind_of(config) == kind_of(config.model_dump()) == config.kind
    old = PredictorConfig(num_layers=2).model_dump(exclude={"kind"})
    assert model_config(old) == PredictorConfig(num_layers=2)
    assert list(KINDS) == ["prime", "jasper", "subspace", "text", "mix"]


def test_a_stored_config_of_no_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        model_config({"kind": "japser"})
    with pytest.raises(ValidationError, match="num_subspaces"):
        model_config({"kind": "jasper", "num_subspaces": 4})


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("fields", [{}, {"residual": "query"}], ids=["none", "query"])
def test_weights_there_and_back_change_no_bit(make: Any, fields: dict[str, Any]) -> None:
    model = make(**fields)
    tensors = state_dict(model)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(tensor.size for tensor in tensors.values()) == sum(leaf.size for leaf in leaves)
    assert all(tensor.dtype == np.float32 and tensor.flags.c_contiguous for tensor in tensors.values())
    again = load_state_dict(model.config, tensors)
    assert type(again) is type(model)
    for name, tensor in state_dict(again).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    np.testing.assert_array_equal(model(*INPUTS), again(*INPUTS))


def test_names_and_layouts_of_the_weights() -> None:
    """torch's: `[out, in]`, and the names of the attributes."""
    stacks = {"question_encoder": 8, "steering_encoder": 8, "head": 32}
    expected: dict[str, tuple[int, ...]] = {"output_proj.weight": (8, 16), "output_proj.bias": (8,)}
    for name, inputs in stacks.items():
        for block, size in enumerate((inputs, 16)):
            expected[f"{name}.linears.{block}.weight"] = (16, size)
            for part in ("linears.{}.bias", "norms.{}.weight", "norms.{}.bias"):
                expected[f"{name}.{part.format(block)}"] = (16,)
    assert {name: tensor.shape for name, tensor in state_dict(jasper()).items()} == expected


@pytest.mark.parametrize("make", MAKERS)
def test_tensors_that_do_not_fit_are_named(make: Any) -> None:
    model = make()
    whole = state_dict(model)
    name = "steering_encoder.norms.1.bias"
    spoilt = {
        "is missing": {key: value for key, value in whole.items() if key != name},
        "has shape": whole | {name: np.zeros(3, np.float32)},
        "holds NaN": whole | {name: np.full(16, np.nan, np.float32)},
        "is unexpected": whole | {"coarse_gate": np.zeros((), np.float32)},
    }
    for message, tensors in spoilt.items():
        with pytest.raises(CheckpointError, match=message):
            load_state_dict(model.config, tensors)
