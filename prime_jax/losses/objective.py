"""What training minimises, and the only place where per-example values are averaged."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from prime_jax.losses.contrastive import info_nce
from prime_jax.losses.corpus import Corpus, corpus_info_nce
from prime_jax.types import Batch


def contrastive_objective(
    predicted: Float[Array, "B E"], batch: Batch, temperature: float, corpus: Corpus | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean InfoNCE of a batch, against the batch or the whole corpus, with the figures that make it readable.

    Returns:
        The scalar loss, and `loss`, `chance` (the loss of guessing), `negatives` (effective, per row) and
        `similarity` (mean cosine of prediction and target).
    """
    if corpus is None:
        values = info_nce(predicted, batch, temperature=temperature)
    else:
        values = corpus_info_nce(predicted, batch, corpus, temperature=temperature)
    loss = jnp.mean(values.loss)
    return loss, {
        "loss": loss,
        "chance": jnp.mean(values.chance),
        "negatives": jnp.mean(values.negatives.astype(jnp.float32)),
        "similarity": jnp.mean(jnp.sum(predicted * batch.target, axis=-1)),
    }
