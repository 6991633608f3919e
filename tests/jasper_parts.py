"""Made-up batches and small models for the tests of JASPER."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prime_jax.models.jasper import JasperConfig, JasperPredictor
from prime_jax.models.subspace import DecomposedJasperPredictor, SubspaceConfig
from prime_jax.types import Batch

DIM, CLUSTERS = 8, 4
SMALL: dict[str, Any] = {"input_dim": DIM, "output_dim": DIM, "hidden_dim": 16, "num_layers": 2}


def unit_rows(seed: int, *shape: int) -> jax.Array:
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


CENTROIDS = unit_rows(7, CLUSTERS, DIM)


def batch(seed: int = 0, rows: int = 6, hard: int = 0, **fields: Any) -> Batch:
    """Rows with steering, every third without; `hard` negatives each, of which the last slot is empty."""
    rng = np.random.default_rng(seed)
    if hard:
        ids = 100 + np.arange(rows * hard).reshape(rows, hard)
        ids[:, -1] = -1
        fields |= {"negatives": unit_rows(seed + 50, rows, hard, DIM), "negative_ids": jnp.asarray(ids)}
    whole = {
        "context": unit_rows(seed + 10, rows, 1, DIM),
        "context_mask": jnp.arange(rows)[:, None] % 3 < 2,
        "query": unit_rows(seed + 20, rows, DIM),
        "target": unit_rows(seed + 30, rows, DIM),
        "target_id": jnp.arange(rows),
        "positive_ids": jnp.arange(rows)[:, None],
        "example": jnp.arange(rows),
        "cluster": jnp.asarray(rng.integers(CLUSTERS, size=rows)),
        "steering": jnp.arange(rows) % 3,
    }
    return Batch(**(whole | fields))


def jasper(seed: int = 0, **fields: Any) -> JasperPredictor:
    model = JasperConfig(**(SMALL | fields)).build(rngs=nnx.Rngs(seed))
    _open(model)
    return model


def subspace(seed: int = 0, **fields: Any) -> DecomposedJasperPredictor:
    """A model with known centroids."""
    model = SubspaceConfig(**(SMALL | {"num_subspaces": CLUSTERS} | fields)).build(rngs=nnx.Rngs(seed))
    model.centroids[...] = CENTROIDS
    _open(model)
    return model


def _open(model: Any) -> None:
    """Gates that start at zero would hide most of a model."""
    for gate, value in (("residual_gate", 0.7), ("coarse_gate", 0.4)):
        if hasattr(model, gate):
            getattr(model, gate)[...] = jnp.float32(value)


def in_torch(
    tensors: Mapping[str, np.ndarray], question: jax.Array, steering: jax.Array, **config: Any
) -> dict[str, np.ndarray]:
    """What a model with these tensors answers, in plain torch: `embedding` and, with a router, the rest."""
    import torch
    from torch.nn import functional

    own = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    given = [torch.tensor(np.asarray(question)), torch.tensor(np.asarray(steering))]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

    def stack(name: str, x: torch.Tensor) -> torch.Tensor:
        for block in range(config["num_layers"]):
            x = functional.gelu(linear(f"{name}.linears.{block}", x))
            norm = f"{name}.norms.{block}"
            x = functional.layer_norm(x, x.shape[1:], own[f"{norm}.weight"], own[f"{norm}.bias"])
        return x

    read = [stack("question_encoder", given[0]), stack("steering_encoder", given[1])]
    found, base = {}, torch.zeros(())
    if "centroids" in own:
        logits = linear("router.choice", stack("router.body", torch.cat(given, dim=1)))
        weights = torch.softmax(logits, dim=1)
        if config.get("routing") == "argmax":
            weights = functional.one_hot(weights.argmax(dim=1), weights.shape[1]).float()
        base = weights @ own["centroids"]
        found = {"logits": logits, "routing": weights, "coarse": base}
        read.append(stack("coarse_encoder", base))
    joined = sum(read) if config.get("fine_input") == "add" else torch.cat(read, dim=1)
    delta = linear("output_proj", stack("head", joined))
    if config.get("residual") == "query":
        delta = own.get("coarse_gate", torch.zeros(())) * base + own["residual_gate"] * delta
        if "max_delta" in config:
            delta = delta * (config["max_delta"] / delta.norm(dim=1, keepdim=True)).clamp(max=1)
        base = given[0]
    found["embedding"] = functional.normalize(base + delta, dim=1)
    if "coarse" in found:
        found["fine"] = found["embedding"] - found["coarse"]
    return {name: tensor.numpy() for name, tensor in found.items()}
