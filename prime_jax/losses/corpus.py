"""InfoNCE against the whole corpus: where targets are frozen, every passage can be an exact negative.

The log-sum-exp over all passages is streamed in chunks, forward and backward, so that memory grows with the
batch and the chunk but not with the corpus (the online softmax of arXiv 1805.02867). On several devices each
holds its share of the passages; the queries travel, not the passages.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from prime_jax.losses.contrastive import InfoNCE, mean_over_answers
from prime_jax.nn.attention import MASKED
from prime_jax.nn.linear import einsum_accumulate_f32, unit
from prime_jax.types import Batch

Queries = tuple[Array, Array, Array | None]  # queries, what is left out for each, and their scopes
Chunks = tuple[Array, Array, Array | None]  # numbers of their first passages, the passages, and their scopes


@struct.dataclass
class Corpus:
    """All passages, in chunks of one size.

    Attributes:
        chunks: Unit-norm embeddings, zero behind the last passage, `[C, chunk, E]`; on several devices the
            chunks are shared out among them.
        rows: How many passages there are, M.
        mesh: The devices that share them; None for one.
        scope: Code of each passage's scope, `[C, chunk]`, on every device; None where there is one for all.
        in_scope: How many passages have each code, `[S]`, or None.
    """

    chunks: Any  # Array, or what JAX puts in its place when it describes a program
    rows: int = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    scope: Any = None
    in_scope: Any = None


def in_chunks(
    embeddings: Float[np.ndarray, "M E"],
    chunk: int,
    mesh: Mesh | None = None,
    scope: Int[np.ndarray, " M"] | None = None,
) -> Corpus:
    """Normalise the passages and cut them into chunks.

    Args:
        embeddings: The passages; with several processes every one of them has them all.
        chunk: Rows of a chunk, fewer where a device's share is smaller.
        mesh: Devices to share the chunks among; None keeps them on one.
        scope: Scope of each passage: only those of an example's own are its negatives, as only those are
            searched for it. None, or one for all, is no restriction.
    """
    rows, dim = embeddings.shape
    devices = 1 if mesh is None else mesh.size
    size = min(chunk, -(-rows // devices))
    count = -(-rows // (size * devices)) * devices
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    filled = np.zeros((count * size, dim), np.float32)
    filled[:rows] = embeddings / np.maximum(length, 1e-12)
    chunks = filled.reshape(count, size, dim)
    scopes: tuple[np.ndarray, ...] = ()
    if scope is not None and len(np.unique(scope)) > 1:
        codes = np.unique(scope, return_inverse=True)[1].astype(np.int32)
        padded = np.pad(codes, (0, count * size - rows), constant_values=-1).reshape(count, size)
        scopes = (padded, np.bincount(codes).astype(np.int32))
    if mesh is None:
        return Corpus(jnp.asarray(chunks), rows, None, *map(jnp.asarray, scopes))
    shares, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())

    def placed(array: np.ndarray, sharding: NamedSharding) -> Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

    return Corpus(placed(chunks, shares), rows, mesh, *(placed(one, whole) for one in scopes))


def corpus_info_nce(
    predicted: Float[Array, "B E"],
    batch: Batch,
    corpus: Corpus,
    *,
    temperature: float | Float[Array, ""] = 0.07,
) -> InfoNCE:
    """InfoNCE of each example against every passage of its scope that is not one of its right answers.

    The sibling of `info_nce`, with M candidates in place of B. Explicit negatives of the batch are passages
    too and need no further place. As there, a row with `positives` has the mean loss of its right answers.

    Args:
        predicted: Predictions, `[B, E]`; normalised here.
        batch: Targets and the corpus rows of the right answers.
        corpus: All passages.
        temperature: Divides the cosine similarities; 0.07 (BR-PRED-003).
    """
    predicted = unit(predicted) / temperature
    scope = None if corpus.scope is None else corpus.scope.reshape(-1)[batch.target_id]
    wrong = _log_sum_exp(predicted, corpus, batch.positive_ids, scope)
    if batch.positives is None:
        with jax.named_scope("info_nce"):
            right = jnp.einsum("be,be->b", predicted, unit(batch.target))
        loss = jnp.logaddexp(right, wrong) - right
    else:
        loss = mean_over_answers(predicted, batch, wrong)
    right_answers = jnp.sum(batch.positive_ids >= 0, axis=1)
    candidates = corpus.rows if scope is None else corpus.in_scope[scope]
    return InfoNCE(loss=loss, negatives=candidates - right_answers)


@jax.custom_vjp
def _log_sum_exp(
    queries: Float[Array, "B E"],
    corpus: Corpus,
    left_out: Int[Array, "B P"],
    scope: Int[Array, " B"] | None,
) -> Float[Array, " B"]:
    """Log-sum-exp of `queries @ corpus.T` over all passages of a row's scope but those left out."""
    return _forward(queries, corpus, left_out, scope)[0]


def _forward(
    queries: Array, corpus: Corpus, left_out: Array, scope: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    def share(given: Queries, chunks: Chunks, axes: Any) -> Array:
        queries = given[0]

        def add(carry: tuple[Array, Array], chunk: Chunks) -> tuple[tuple[Array, Array], None]:
            largest, total = carry
            logits = _logits(given, chunk, corpus.rows)
            now = jnp.maximum(largest, jnp.max(logits, axis=1))
            total = total * jnp.exp(largest - now) + jnp.sum(jnp.exp(logits - now[:, None]), axis=1)
            return (now, total), None

        start = (jnp.full_like(queries[:, 0], MASKED), jnp.zeros_like(queries[:, 0]))
        (largest, total), _ = jax.lax.scan(add, start, chunks)
        if axes:
            over_all = jax.lax.pmax(largest, axes)
            total = jax.lax.psum(total * jnp.exp(largest - over_all), axes)
            largest = over_all
        return largest + jnp.log(total)

    answer = _shared_out(share, corpus)((queries, left_out, scope))
    return answer, (queries, corpus, left_out, scope, answer)


def _backward(kept: tuple[Any, ...], slope: Float[Array, " B"]) -> tuple[Array, None, None, None]:
    """The gradient: the mean passage under the softmax, computed anew chunk by chunk. The corpus has none."""
    queries, corpus, left_out, scope, answer = kept

    def share(given: tuple[Queries, Array], chunks: Chunks, axes: Any) -> Array:
        asked, answer = given

        def add(mean: Array, chunk: Chunks) -> tuple[Array, None]:
            part = jnp.exp(_logits(asked, chunk, corpus.rows) - answer[:, None])
            with jax.named_scope("corpus_info_nce"):
                return mean + einsum_accumulate_f32("bm,me->be", part, chunk[1], jnp.float32), None

        mean, _ = jax.lax.scan(add, jnp.zeros_like(asked[0]), chunks)
        return jax.lax.psum(mean, axes) if axes else mean

    gradient = slope[:, None] * _shared_out(share, corpus)(((queries, left_out, scope), answer))
    return gradient, None, None, None


_log_sum_exp.defvjp(_forward, _backward)


def _shared_out(share: Callable[..., Array], corpus: Corpus) -> Callable[..., Array]:
    """Run `share(given, chunks, axes)` on every device's own chunks; what is given is whole on each."""
    count, size, _ = corpus.chunks.shape
    chunks: Chunks = (jnp.arange(count) * size, corpus.chunks, corpus.scope)
    if corpus.mesh is None:
        return lambda given: share(given, chunks, ())
    axes = corpus.mesh.axis_names

    def on_devices(given: Any) -> Array:
        # Every device ends with the same answer, which JAX cannot see for itself through the scan.
        mapped = jax.shard_map(
            partial(share, axes=axes),
            mesh=corpus.mesh,
            in_specs=(P(), P(axes)),
            out_specs=P(),
            check_vma=False,
        )
        answer: Array = mapped(given, chunks)
        return answer

    return on_devices


@jax.named_scope("corpus_info_nce")
def _logits(given: Queries, chunk: Chunks, rows: int) -> Float[Array, "B m"]:
    """Scores of one chunk's passages; those left out, of another scope, or only there to fill it, at nothing.

    Args:
        given: Queries, what is left out for each, and their scopes where there are such.
        chunk: Number of its first passage, its passages `[m, E]`, and their scopes `[m]`.
        rows: How many passages there are.
    """
    (queries, left_out, scope), (start, passages, passage_scope) = given, chunk
    size = passages.shape[0]
    scores = einsum_accumulate_f32("be,me->bm", queries, passages, jnp.float32)
    scores = jnp.where(start + jnp.arange(size) < rows, scores, MASKED)
    if scope is not None:
        scores = jnp.where(passage_scope == scope[:, None], scores, MASKED)
    # A negative column would count from the end, so everything before this chunk is sent past its end.
    column = jnp.where(left_out >= start, left_out - start, size)
    return scores.at[jnp.arange(queries.shape[0])[:, None], column].set(MASKED, mode="drop")
