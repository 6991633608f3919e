"""Every kind of prediction compiles for a GPU.

XLA refused one that ends with a concatenation of its answer and a column: for several rows, on GPUs alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_text
from flax import nnx
from gpu_compiler import compiled, needs_gpu_compiler, there
from predictors import LLAMA, make

from prime_jax.models import EmbeddingModel
from prime_jax.models.jasper import JasperConfig
from prime_jax.models.mix import MixConfig
from prime_jax.nn import attention
from prime_jax.predict import forward
from prime_jax.predict.forward import empty_cache
from prime_jax.predict.packing import Flat, Packing, flat, valid_input, with_state
from prime_jax.predict.passes import forward_pass
from prime_jax.predict.precision import Recipe
from prime_jax.predict.session_programs import _advance_packed, new_turn_counts
from prime_jax.predict.staging import Staging

pytestmark = needs_gpu_compiler
PRIME: list[dict[str, Any]] = [
    {"context_attention": "causal", "residual": "none"},
    {"context_attention": "full", "residual": "linear"},
    {"context_attention": "prefix", "residual": "query", "max_delta": 0.3},
    {"context_attention": "causal", "residual": "copy", **LLAMA},
]


def names(fields: dict[str, Any]) -> str:
    return f"{fields['context_attention']}-{fields['residual']}"


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, forward):
        monkeypatch.setattr(module, "on_gpu", lambda: True)


def arguments(model: EmbeddingModel, dtype: Any) -> Flat:
    def here(function: Any, *_: Any, **__: Any) -> Any:
        return jax.jit(function)

    return flat(forward_pass(model).lay_out(dtype, outputs_first=False, compile_with=here))


def predicts(model: EmbeddingModel, batch: int, dtype: Any) -> str:
    """The program that a predictor compiles for such a batch."""
    config: Any = model.config
    weights, packing = arguments(model, dtype), Packing(batch, config.max_context_length, config.input_dim)
    program = forward_pass(model).program(dtype, dtype)

    def predict(packed: jax.Array, *given: jax.Array) -> jax.Array:
        request = packing.unpack(packed)
        return with_state(program(weights.restore(*given), *request), valid_input(*request))

    shapes = there((jax.ShapeDtypeStruct(packing.shape, jnp.float32), *weights.arguments))
    return compiled(jax.jit(predict).trace(*shapes).lower(lowering_platforms=("cuda",)))


@pytest.mark.parametrize(("batch", "dtype"), [(1, "bfloat16"), (8, "float32")])
@pytest.mark.parametrize("fields", PRIME, ids=names)
def test_predictions_compile(fields: dict[str, Any], batch: int, dtype: Any) -> None:
    assert predicts(make(**fields), batch, dtype)


@pytest.mark.parametrize("config", [MixConfig(input_dim=16, output_dim=16), JasperConfig(input_dim=16)])
def test_other_models_compile(config: Any) -> None:
    assert predicts(config.build(rngs=nnx.Rngs(0)), 4, "float32")


@pytest.mark.parametrize(("batch", "fields"), [(8, fields) for fields in PRIME] + [(1, PRIME[0])])
def test_sessions_compile(batch: int, fields: dict[str, Any]) -> None:
    model = make(**fields)
    config = model.config
    weights = arguments(model, "bfloat16")
    cache = jax.eval_shape(partial(empty_cache, config, batch))
    for new in new_turn_counts(config)[:2]:
        advance = _advance_packed(
            config, weights, Recipe("bfloat16", "bfloat16"), new, Staging(jax.devices()[0])
        )
        packed = jax.ShapeDtypeStruct((batch, (new + 1) * config.input_dim + 2), jnp.float32)
        shapes = there((cache, packed, *weights.arguments))
        assert compiled(jax.jit(advance).trace(*shapes).lower(lowering_platforms=("cuda",)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_text_predictor_compiles(dtype: Any) -> None:
    graph, params = nnx.split(tiny_text.text_model(tiny_text.text_config(), dtype=dtype))
    predict = jax.jit(lambda params, tokens, mask: nnx.merge(graph, params)(tokens, mask))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.bool_)
    assert compiled(predict.trace(*there((params, *tokens))).lower(lowering_platforms=("cuda",)))
