"""Counting the arithmetic of training, to tell how much of a device it uses (MFU, arXiv 2204.02311)."""

from typing import Literal

import jax
from flax import nnx

from prime_jax.models import AnyConfig
from prime_jax.models.prime import PredictorConfig
from prime_jax.models.text import TextConfig

DType = Literal["bfloat16", "float32"]

# Dense peaks in TFLOP/s as the vendors' data sheets give them: bfloat16 (float16 where there is none), and
# float32 without TF32; TPUs multiply float32 in passes of bfloat16. The first row decides whose words are all
# in JAX's name of the device, such as "NVIDIA A100-SXM4-80GB".
PEAKS: dict[str, tuple[float, float]] = {
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H100 NVL": (835, 60),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "B200": (2250, 80),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "A10G": (70, 31.2),
    "V100 PCIe": (112, 14),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "TPU v6 lite": (918, 918),
    "TPU v6e": (918, 918),
    "TPU v5 lite": (197, 197),
    "TPU v5e": (197, 197),
    "TPU v5": (459, 459),  # v5p
    "TPU v5p": (459, 459),
    "TPU v4 lite": (138, 138),
    "TPU v4": (275, 275),
}


def forward_flops(config: AnyConfig) -> float:
    """FLOPs of predicting one full window: every matrix product, two per multiply-add."""
    if isinstance(config, TextConfig):
        return config.forward_flops()
    if not isinstance(config, PredictorConfig):  # every matrix is met once
        weights = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(weights, nnx.Param))
        return 2.0 * sum(int(leaf.size) for leaf in leaves if leaf.ndim > 1)
    hidden, tokens = config.hidden_dim, config.max_context_length + 2
    inputs = (tokens - 1) * config.input_dim * hidden + hidden * config.output_dim
    asking_width, asked_width = config.num_heads * config.head_size, config.kv_heads * config.head_size
    inner = 2 * 4 * hidden if config.block == "gelu" else 3 * (config.mlp_dim or 4 * hidden)
    whole = 0.0
    for layer in range(config.num_layers):
        asking = 1 if layer == config.num_layers - 1 else tokens  # the last layer computes [PRED] alone
        keys_and_values = 2 * tokens * hidden * asked_width
        queries_and_output = 2 * asking * hidden * asking_width
        attention = 2 * asking * tokens * asking_width
        whole += keys_and_values + queries_and_output + attention + asking * hidden * inner
    return 2.0 * (inputs + whole)


def flops_per_example(config: AnyConfig, *, recomputed: bool) -> float:
    """FLOPs of learning from one example: forward, and twice as much backward.

    Args:
        config: The model.
        recomputed: Count a second forward pass, which remat policy "blocks" makes but for the inputs' and the
            output's projections, and a micro-batch in full. MFU leaves it out.
    """
    return (4 if recomputed else 3) * forward_flops(config)


def loss_flops(batch: int, candidates: int, dim: int) -> float:
    """FLOPs of the similarities `[batch, candidates]` of one step, and of their gradient for the predictions.

    Candidates are taken as encoded, so they get none. `flops_per_example` leaves these products out: with the
    default model they add 2% at 65,536 in-batch candidates, but a third at a million passages.
    """
    return 2 * 2.0 * batch * candidates * dim


def peak_flops(kind: str, dtype: DType) -> float | None:
    """FLOPs per second that a device of a kind (JAX's `device_kind`) reaches at best, None where unknown."""
    words = set(kind.lower().replace("-", " ").split())
    found = next((peaks for name, peaks in PEAKS.items() if words.issuperset(name.lower().split())), None)
    if found is None or "mig" in words:  # of a share of a card nothing is published
        return None
    return 1e12 * found[0 if dtype == "bfloat16" else 1]


def mfu(samples_per_second: float, per_example: float, devices: int, kind: str, dtype: DType) -> float | None:
    """Share of the devices' peak that the model's own arithmetic uses, None where the peak is not known."""
    peak = peak_flops(kind, dtype)
    return None if peak is None else samples_per_second * per_example / (devices * peak)
