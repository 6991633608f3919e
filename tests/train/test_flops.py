"""The count of arithmetic, held to XLA's own."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from prime_jax.losses.contrastive import info_nce
from prime_jax.models.prime import PredictorConfig
from prime_jax.nn.remat import Remat
from prime_jax.train.flops import flops_per_example, forward_flops, loss_flops, mfu, peak_flops
from prime_jax.types import Batch

CONFIGS = [
    PredictorConfig(input_dim=64, output_dim=64, hidden_dim=256, num_layers=2, num_heads=4, dropout=0.0),
    PredictorConfig(
        input_dim=128, output_dim=128, hidden_dim=512, num_layers=3, num_heads=8, max_context_length=5
    ),
    PredictorConfig(
        input_dim=64,
        output_dim=64,
        hidden_dim=256,
        num_layers=2,
        num_heads=4,
        dropout=0.0,
        block="llama",
        num_kv_heads=2,
    ),
]


def counted_by_xla(config: PredictorConfig, *, backward: bool, remat: Remat = "none") -> float:
    """FLOPs per example of the program before it is fused, so that every product is seen."""
    graph, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    inputs = config.fake_inputs(8)

    def forward(params: Any, inputs: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        return jnp.sum(model(inputs["context"], inputs["query"], inputs["context_mask"], remat=remat))

    program = jax.value_and_grad(forward) if backward else forward
    return jax.jit(program).lower(params, inputs).cost_analysis()["flops"] / 8


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_and_backward_agree_with_xla(config: PredictorConfig) -> None:
    """XLA also counts norms, softmax and GELU, but no gradient of the embeddings that come in."""
    assert 1.0 <= counted_by_xla(config, backward=False) / forward_flops(config) < 1.05
    trained = flops_per_example(config, recomputed=False)
    assert 0.98 <= counted_by_xla(config, backward=True) / trained < 1.03


@pytest.mark.parametrize("config", CONFIGS)
def test_recomputation_is_work_but_not_the_models(config: PredictorConfig) -> None:
    """A fourth forward pass, of the blocks alone: 92 to 100% of what is counted."""
    counted = counted_by_xla(config, backward=True, remat="blocks")
    assert 0.92 < counted / flops_per_example(config, recomputed=True) <= 1.0


def test_similarities_agree_with_xla() -> None:
    """512 predictions against 512 targets; the softmax is a little more."""
    rows, dim = 512, 1024

    def loss(predicted: jax.Array, target: jax.Array) -> jax.Array:
        ids, unused = jnp.arange(rows), jnp.zeros((rows, 1, 1))
        batch = Batch(unused, unused[..., 0] > 0, unused[..., 0], target, ids, ids[:, None], ids)
        return jnp.sum(info_nce(predicted, batch).loss)

    shape = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    counted = jax.jit(jax.value_and_grad(loss)).lower(shape, shape).cost_analysis()["flops"]
    assert 1.0 <= counted / loss_flops(rows, rows, dim) < 1.05


def test_mfu_by_hand() -> None:
    """15,000 samples/s of 1 GFLOP each on one H200: 15 of 989 TFLOP/s."""
    h200, cpu = "NVIDIA H200", "cpu"
    assert peak_flops(h200, "bfloat16") == 989e12
    assert peak_flops(h200, "float32") == 67e12
    assert mfu(15_000.0, 1e9, 1, h200, "bfloat16") == pytest.approx(15 / 989)
    assert mfu(15_000.0, 1e9, 1, cpu, "bfloat16") is None


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("TPU v4", 275),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
        ("TPU v6e", 918),
    ],
)
def test_devices_are_known_by_the_names_that_jax_gives_them(kind: str, teraflops: float) -> None:
    assert peak_flops(kind, "bfloat16") == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA T400 4GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_no_peak_is_better_than_that_of_another_device(kind: str) -> None:
    assert peak_flops(kind, "bfloat16") is None
