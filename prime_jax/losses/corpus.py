"""InfoNCE against the whole corpus: where targets are frozen, every passage can be an exact negative.

The log-sum-exp over all passages is streamed in chunks, forward and backward, so that memory grows with the
batch and the chunk but not with the corpus (the online softmax of arXiv 1805.02867).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from prime_jax.losses.contrastive import InfoNCE
from prime_jax.nn.attention import MASKED
from prime_jax.nn.linear import product, unit
from prime_jax.types import Batch


@struct.dataclass
class Corpus:
    """All passages, in chunks of one size.

    Attributes:
        chunks: Unit-norm embeddings, zero behind the last passage, `[C, chunk, E]`.
        rows: How many passages there are, M.
    """

    chunks: Any  # Array, or what JAX puts in its place when it describes a program
    rows: int = struct.field(pytree_node=False)


def in_chunks(embeddings: Float[np.ndarray, "M E"], chunk: int) -> Corpus:
    """Normalise the passages and cut them into chunks of `chunk` rows, or of M where that is less."""
    rows = len(embeddings)
    size = min(chunk, rows)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    filled = np.zeros((-(-rows // size) * size, embeddings.shape[1]), np.float32)
    filled[:rows] = embeddings / np.maximum(length, 1e-12)
    return Corpus(jnp.asarray(filled.reshape(-1, size, embeddings.shape[1])), rows)


def corpus_info_nce(
    predicted: Float[Array, "B E"],
    batch: Batch,
    corpus: Corpus,
    *,
    temperature: float | Float[Array, ""] = 0.07,
) -> InfoNCE:
    """InfoNCE of each example against every passage that is not one of its right answers.

    The sibling of `info_nce`, with M candidates in place of B. Explicit negatives of the batch are passages
    too and need no further place.

    Args:
        predicted: Predictions, `[B, E]`; normalised here.
        batch: Targets and the corpus rows of the right answers.
        corpus: All passages.
        temperature: Divides the cosine similarities; 0.07 (BR-PRED-003).
    """
    predicted = unit(predicted) / temperature
    right = jnp.einsum("be,be->b", predicted, unit(batch.target))
    wrong = _log_sum_exp(predicted, corpus, batch.positive_ids)
    right_answers = jnp.sum(batch.positive_ids >= 0, axis=1)
    return InfoNCE(loss=jnp.logaddexp(right, wrong) - right, negatives=corpus.rows - right_answers)


@jax.custom_vjp
def _log_sum_exp(
    queries: Float[Array, "B E"], corpus: Corpus, left_out: Int[Array, "B P"]
) -> Float[Array, " B"]:
    """Log-sum-exp of `queries @ corpus.T` over all passages but those left out."""
    return _forward(queries, corpus, left_out)[0]


def _forward(queries: Array, corpus: Corpus, left_out: Array) -> tuple[Array, tuple[Any, ...]]:
    batch = queries.shape[0]

    def add(carry: tuple[Array, Array], indexed: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        largest, total = carry
        logits = _logits(queries, *indexed, corpus.rows, left_out)
        now = jnp.maximum(largest, jnp.max(logits, axis=1))
        total = total * jnp.exp(largest - now) + jnp.sum(jnp.exp(logits - now[:, None]), axis=1)
        return (now, total), None

    start = (jnp.full(batch, MASKED), jnp.zeros(batch))
    (largest, total), _ = jax.lax.scan(add, start, _indexed(corpus))
    answer = largest + jnp.log(total)
    return answer, (queries, corpus, left_out, answer)


def _backward(kept: tuple[Any, ...], slope: Float[Array, " B"]) -> tuple[Array, None, None]:
    """The gradient: the mean passage under the softmax, computed anew chunk by chunk. The corpus has none."""
    queries, corpus, left_out, answer = kept

    def add(mean: Array, indexed: tuple[Array, Array]) -> tuple[Array, None]:
        share = jnp.exp(_logits(queries, *indexed, corpus.rows, left_out) - answer[:, None])
        return mean + product("bm,me->be", share, indexed[1], jnp.float32), None

    mean, _ = jax.lax.scan(add, jnp.zeros_like(queries), _indexed(corpus))
    return slope[:, None] * mean, None, None


_log_sum_exp.defvjp(_forward, _backward)


def _indexed(corpus: Corpus) -> tuple[Array, Array]:
    """The first row of every chunk, and the chunks."""
    count, size, _ = corpus.chunks.shape
    return jnp.arange(count) * size, corpus.chunks


def _logits(
    queries: Float[Array, "B E"],
    start: Int[Array, ""],
    chunk: Float[Array, "m E"],
    rows: int,
    left_out: Int[Array, "B P"],
) -> Float[Array, "B m"]:
    """Scores of one chunk's passages; those left out, and what only fills the last chunk, at nothing."""
    size = chunk.shape[0]
    scores = product("be,me->bm", queries, chunk, jnp.float32)
    scores = jnp.where(start + jnp.arange(size) < rows, scores, MASKED)
    # A negative column would count from the end, so everything before this chunk is sent past its end.
    column = jnp.where(left_out >= start, left_out - start, size)
    return scores.at[jnp.arange(queries.shape[0])[:, None], column].set(MASKED, mode="drop")
