"""Small steered models and requests that tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prime_jax.models import KINDS
from prime_jax.models.jasper import JasperPredictor
from prime_jax.models.subspace import DecomposedJasperPredictor

D, H, K = 24, 32, 5
Steered = JasperPredictor | DecomposedJasperPredictor


def make(kind: str, seed: int = 0, **fields: object) -> Steered:
    """A model whose every weight matters: no bias, gate or norm is as it starts; unit centroids."""
    shape: dict[str, object] = {"input_dim": D, "output_dim": D, "hidden_dim": H}
    if kind == "subspace":
        shape["num_subspaces"] = K
    model = KINDS[kind](**(shape | fields)).build(rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def shaken(weight: jax.Array) -> jax.Array:
        return weight + jnp.asarray(0.1 * rng.normal(size=weight.shape), jnp.float32)

    nnx.update(model, jax.tree.map(shaken, nnx.state(model)))
    for name in ("residual_gate", "coarse_gate"):
        if hasattr(model, name):
            getattr(model, name)[...] = jnp.float32(0.7)
    if isinstance(model, DecomposedJasperPredictor):
        model.centroids[...] = jnp.asarray(unit_vectors(rng, K))
        model.router.choice.kernel[...] = 4 * model.router.choice.kernel[...]  # rows choose differently
    return model


def unit_vectors(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def requests(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context, query, mask: rows i % 3 == 0 have no steering, and NaN or huge numbers in its place."""
    rng = np.random.default_rng(seed)
    steering, question = unit_vectors(rng, rows), unit_vectors(rng, rows)
    mask = np.arange(rows)[:, None] % 3 > 0
    garbage = np.where(np.arange(rows)[:, None] % 2, np.float32(np.nan), np.float32(1e6))
    return np.where(mask, steering, garbage)[:, None], question, mask


def answers(
    model: Steered, context: np.ndarray, query: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """What JAX says, in one compiled call, by name of the output."""
    found = jax.jit(model.details)(jnp.asarray(context), jnp.asarray(query), jnp.asarray(mask))._asdict()
    names = ("embedding", "routing", "coarse", "fine")
    return {name: np.asarray(found[name]) for name in names if found[name] is not None}


def feeds(context: np.ndarray, query: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """As ONNX Runtime takes them."""
    return {"context": context, "context_mask": mask, "query": query}
