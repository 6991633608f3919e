"""Small predictors, requests and sessions that tests share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import nnx

from prime_jax.models.confidence import Confidence
from prime_jax.models.prime import EmbeddingPredictor, PredictorConfig
from prime_jax.train.calibration import centres_of, fit

N, D = 4, 24
LLAMA = {"block": "llama", "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 96, "rope_theta": 50.0}
LLAMA["rope_scaling"] = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make(seed: int = 0, **fields: object) -> EmbeddingPredictor:
    """A predictor whose every weight matters: gate, biases and copy content are not at zero."""
    shape = {"input_dim": D, "output_dim": D, "hidden_dim": 128, "max_context_length": N}
    config = PredictorConfig(**(shape | {"num_layers": 2, "num_heads": 4} | fields))
    model = config.build(rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def shaken(weight: jax.Array) -> jax.Array:
        return weight + jnp.asarray(0.1 * rng.normal(size=weight.shape), jnp.float32)

    nnx.update(model, jax.tree.map(shaken, nnx.state(model)))
    if config.residual != "none":
        model.residual_gate[...] = jnp.float32(0.7)
    return model


def requests(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context, query, mask: row i has i % (N + 1) real turns at random places; padding holds garbage."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, N + 1, D))
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    mask = rng.permuted(np.arange(N) < (np.arange(rows) % (N + 1))[:, None], axis=1)
    context = np.where(mask[..., None], vectors[:, :N], np.float32(np.nan))
    context[::2] = np.where(mask[::2, :, None], context[::2], np.float32(1e4))
    return context, vectors[:, N].copy(), mask


def answers(
    model: EmbeddingPredictor, context: np.ndarray, query: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """What JAX predicts, in one compiled call."""
    return np.asarray(jax.jit(model)(jnp.asarray(context), jnp.asarray(query), jnp.asarray(mask)))


def session(path: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that does not keep other cores spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def calibrated(model: EmbeddingPredictor, gain: float = 0.5) -> Confidence:
    """As training would fit it, on random conversations in the first half of the dimensions."""
    context, query, mask = conversations(60)
    predicted = np.asarray(model(*map(jnp.asarray, (context, query, mask))))
    rng = np.random.default_rng(0)
    return fit(
        context,
        mask,
        query,
        predicted,
        hit=rng.random(60) < 0.6,
        gain=gain + rng.normal(0, 0.1, 60),
        query_centres=centres_of(query),
        answer_centres=centres_of(predicted),
    )


def conversations(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    context, query, mask = requests(rows)
    half = np.arange(D) < D // 2
    return np.where(mask[..., None], context, 0).astype(np.float32), query * half, mask
