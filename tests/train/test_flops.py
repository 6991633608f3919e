"""The count of arithmetic, held to XLA's own."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from prime_jax.models.prime import PredictorConfig
from prime_jax.train.flops import flops_per_example, forward_flops, mfu, peak_flops

CONFIGS = [
    PredictorConfig(input_dim=64, output_dim=64, hidden_dim=256, num_layers=2, num_heads=4, dropout=0.0),
    PredictorConfig(
        input_dim=128, output_dim=128, hidden_dim=512, num_layers=3, num_heads=8, max_context_length=5
    ),
]


def counted_by_xla(config: PredictorConfig, *, backward: bool) -> float:
    """FLOPs per example of the compiled program, unfused so that every product is seen."""
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    inputs = config.fake_inputs(8)

    def forward(params: Any, inputs: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(inputs["context"], inputs["query"], inputs["context_mask"]))

    program = jax.value_and_grad(forward) if backward else forward
    return jax.jit(program).lower(params, inputs).cost_analysis()["flops"] / 8


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_and_backward_agree_with_xla(config: PredictorConfig) -> None:
    """XLA also counts norms, softmax and GELU, so it is a little above; never below."""
    assert 1.0 <= counted_by_xla(config, backward=False) / forward_flops(config) < 1.1
    trained = flops_per_example(config, recomputed=False)
    assert 0.9 <= counted_by_xla(config, backward=True) / trained < 1.15


def test_recomputation_is_work_but_not_the_models() -> None:
    config = CONFIGS[0]
    plain, again = (flops_per_example(config, recomputed=flag) for flag in (False, True))
    assert again / plain == pytest.approx(4 / 3)


def test_mfu_by_hand() -> None:
    """15,000 samples/s of 1 GFLOP each on one H200: 15 of 989 TFLOP/s."""
    h200, cpu = "NVIDIA H200", "cpu"
    assert peak_flops(h200, "bfloat16") == 989e12
    assert peak_flops(h200, "float32") == 67e12
    assert mfu(15_000.0, 1e9, 1, h200, "bfloat16") == pytest.approx(15 / 989)
    assert mfu(15_000.0, 1e9, 1, cpu, "bfloat16") is None
