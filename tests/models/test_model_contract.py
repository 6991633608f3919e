"""What every model in the list promises, so that trainer, predictor and export can rely on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import BaseModel

from prime_jax.models import MODELS
from prime_jax.models.subspace import CENTROIDS
from prime_jax.models.text import TextConfig

SMALL = {"input_dim": 8, "output_dim": 8, "hidden_dim": 128, "num_layers": 1, "num_heads": 2}


OF_EMBEDDINGS = [kind for kind in MODELS if kind is not TextConfig]  # test_text_predictor.py has the rest


@pytest.mark.parametrize("kind", OF_EMBEDDINGS, ids=lambda kind: kind.__name__)
def test_a_model_is_built_by_its_config_and_keeps_the_contract(kind: type[BaseModel]) -> None:
    config = kind(**{name: value for name, value in SMALL.items() if name in kind.model_fields})
    model = config.build(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    arrays = {
        name: jnp.asarray(rng.random(shape.shape) < 0.5)
        if shape.dtype == jnp.bool_
        else jnp.asarray(rng.normal(size=shape.shape), shape.dtype)
        for name, shape in config.fake_inputs(3).items()
    }
    answers = model(**arrays)
    assert answers.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(answers, axis=-1), np.ones(3), atol=1e-6)
    for row in range(3):
        alone = model(**{name: array[row : row + 1] for name, array in arrays.items()})
        np.testing.assert_allclose(alone[0], answers[row], atol=1e-5)
    np.testing.assert_array_equal(model.details(**arrays).embedding, answers)
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    weights.pop(CENTROIDS, None)  # never trained
    assert model.num_params() == sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert kind.model_validate_json(config.model_dump_json()) == config
