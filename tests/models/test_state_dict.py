"""Weights by the plan's names: the exact list, the layout, the way back, and every way it can be refused."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prime_jax.errors import CheckpointError
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.models.state_dict import load_state_dict, state_dict

H, D, E, N = 128, 6, 5, 3


def make(**fields: object) -> EmbeddingPredictor:
    shape = {"input_dim": D, "output_dim": E, "hidden_dim": H, "max_context_length": N}
    return PredictorConfig(**(shape | {"num_layers": 1, "num_heads": 2} | fields)).build(rngs=nnx.Rngs(3))


def test_names_and_shapes_are_the_plans() -> None:
    block = {
        "attention.in_proj_weight": (3 * H, H),
        "attention.in_proj_bias": (3 * H,),
        "attention.out_proj.weight": (H, H),
        "attention.out_proj.bias": (H,),
        "mlp.0.weight": (4 * H, H),
        "mlp.0.bias": (4 * H,),
        "mlp.3.weight": (H, 4 * H),
        "mlp.3.bias": (H,),
        "norm1.weight": (H,),
        "norm1.bias": (H,),
        "norm2.weight": (H,),
        "norm2.bias": (H,),
    }
    expected = {
        "context_proj.weight": (H, D),
        "context_proj.bias": (H,),
        "query_proj.weight": (H, D),
        "query_proj.bias": (H,),
        "output_proj.weight": (E, H),
        "output_proj.bias": (E,),
        "pred_token": (1, 1, H),
        "pos_embedding": (1, N + 2, H),
        "norm.weight": (H,),
        "norm.bias": (H,),
    }
    expected |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    tensors = state_dict(make(num_layers=2))
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


@pytest.mark.parametrize(
    ("residual", "more"),
    [
        ("query", {"residual_gate": ()}),
        ("copy", {"residual_gate": (), "copy_age": (N,), "copy_content": (H,)}),
        (
            "linear",
            {
                "residual_gate": (),
                "copy_age": (N,),
                "copy_content": (H,),
                "linear_map.weight": (D, 2 * D),
                "linear_map.bias": (D,),
            },
        ),
    ],
)
def test_a_residual_adds_only_what_it_needs(residual: str, more: dict[str, tuple[int, ...]]) -> None:
    tensors = state_dict(make(output_dim=D, residual=residual))
    plain = state_dict(make(output_dim=D))
    assert {name: tensors[name].shape for name in tensors.keys() - plain.keys()} == more


def test_matrices_are_transposed() -> None:
    """y = x W^T + b with the exported W equals the layer's own answer."""
    model = make()
    tensors = state_dict(model)
    x = np.random.default_rng(0).normal(size=(4, D)).astype(np.float32)
    by_hand = x @ tensors["query_proj.weight"].T + tensors["query_proj.bias"]
    np.testing.assert_allclose(by_hand, model.query_proj(jnp.asarray(x)), atol=1e-6)


@pytest.mark.parametrize("residual", ["none", "linear"])
def test_there_and_back_changes_no_bit(residual: str) -> None:
    model = make(output_dim=D, residual=residual)
    again = load_state_dict(model.config, state_dict(model))
    before, after = (jax.tree_util.tree_leaves_with_path(nnx.state(m)) for m in (model, again))
    assert [path for path, _ in before] == [path for path, _ in after]
    for (path, left), (_, right) in zip(before, after, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))
    rng = np.random.default_rng(1)
    context = jnp.asarray(rng.normal(size=(2, N, D)).astype(np.float32))
    query = jnp.asarray(rng.normal(size=(2, D)).astype(np.float32))
    np.testing.assert_array_equal(model(context, query), again(context, query))


def _without(tensors: dict[str, np.ndarray]) -> None:
    del tensors["layers.0.mlp.3.bias"]


def _renamed(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.0.mlp.2.bias"] = tensors["layers.0.mlp.3.bias"]


def _reshaped(tensors: dict[str, np.ndarray]) -> None:
    tensors["query_proj.weight"] = tensors["query_proj.weight"].T


def _halved(tensors: dict[str, np.ndarray]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].astype(np.float16)


def _spoilt(tensors: dict[str, np.ndarray]) -> None:
    tensors["pos_embedding"][0, 1, 2] = np.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, r"'layers\.0\.mlp\.3\.bias' is missing"),
        (_renamed, r"'layers\.0\.mlp\.2\.bias' is unexpected"),
        (_reshaped, r"'query_proj\.weight' has shape \(6, 128\), expected \(128, 6\)"),
        (_halved, r"'norm\.weight' has dtype float16, expected float32"),
        (_spoilt, r"'pos_embedding' holds NaN or Inf"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    spoil: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    model = make()
    tensors = state_dict(model)
    spoil(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(model.config, tensors)
