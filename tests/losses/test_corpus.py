"""Corpus InfoNCE equals the dense softmax over all passages in any chunking; its memory does not grow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from prime_jax.losses.contrastive import info_nce
from prime_jax.losses.corpus import corpus_info_nce, in_chunks
from prime_jax.types import Batch

ROWS, DIM = 23, 6
RNG = np.random.default_rng(0)
PASSAGES = RNG.normal(size=(ROWS, DIM)).astype(np.float32)
UNIT = PASSAGES / np.linalg.norm(PASSAGES, axis=1, keepdims=True)
POSITIVES = np.array([[3, -1, -1], [22, 0, -1], [5, 6, 7], [0, 22, -1]])


def batch(positives: np.ndarray = POSITIVES) -> Batch:
    rows = len(positives)
    return Batch(
        context=jnp.zeros((rows, 1, DIM)),
        context_mask=jnp.zeros((rows, 1), bool),
        query=jnp.zeros((rows, DIM)),
        target=jnp.asarray(UNIT[positives[:, 0]]),
        target_id=jnp.asarray(positives[:, 0]),
        positive_ids=jnp.asarray(positives),
        example=jnp.arange(rows),
    )


def dense(predicted: jax.Array, temperature: Any) -> jax.Array:
    """The softmax written out, one row of logits for each example."""
    predicted = predicted / jnp.linalg.norm(predicted, axis=1, keepdims=True)
    logits = predicted @ UNIT.T / temperature
    losses = []
    for row, ids in enumerate(POSITIVES):
        kept = [passage for passage in range(ROWS) if passage == ids[0] or passage not in ids]
        losses.append(jax.nn.logsumexp(logits[row, jnp.array(kept)]) - logits[row, ids[0]])
    return jnp.stack(losses)


@pytest.mark.parametrize("chunk", [1, 4, 22, 23, 1000])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_values_and_gradients_equal_the_dense_softmax(chunk: int, temperature: float) -> None:
    predicted = jnp.asarray(RNG.normal(size=(4, DIM)), jnp.float32)
    corpus, weights = in_chunks(PASSAGES, chunk), jnp.array([1.0, 0.5, -2.0, 3.0])

    def streamed(predicted: jax.Array, temperature: jax.Array) -> jax.Array:
        return corpus_info_nce(predicted, batch(), corpus, temperature=temperature).loss

    def slopes(loss: Any) -> Any:
        return jax.jit(jax.grad(lambda p, t: weights @ loss(p, t), argnums=(0, 1)))(
            predicted, jnp.float32(temperature)
        )

    np.testing.assert_allclose(
        streamed(predicted, jnp.float32(temperature)), dense(predicted, temperature), rtol=1e-5, atol=1e-5
    )
    for ours, theirs in zip(slopes(streamed), slopes(dense), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("chunk", [4, 23])
def test_every_right_answer_of_a_row_is_to_be_found(chunk: int) -> None:
    rights = jnp.asarray(np.where(POSITIVES[..., None] >= 0, UNIT[POSITIVES], 0.0), jnp.float32)
    given = batch()._replace(positives=rights)
    predicted = jnp.asarray(RNG.normal(size=(4, DIM)), jnp.float32)

    def streamed(predicted: jax.Array) -> jax.Array:
        return corpus_info_nce(predicted, given, in_chunks(PASSAGES, chunk), temperature=0.1).loss

    def dense_mean(predicted: jax.Array) -> jax.Array:
        predicted = predicted / jnp.linalg.norm(predicted, axis=1, keepdims=True)
        logits, losses = predicted @ UNIT.T / 0.1, []
        for row, ids in zip(logits, POSITIVES, strict=True):
            wrong = jax.nn.logsumexp(row[np.setdiff1d(np.arange(ROWS), ids)])
            losses.append(jnp.mean(jnp.stack([jnp.logaddexp(row[n], wrong) - row[n] for n in ids if n >= 0])))
        return jnp.stack(losses)

    np.testing.assert_allclose(streamed(predicted), dense_mean(predicted), rtol=1e-5, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda p, loss=loss: loss(p).sum())(predicted) for loss in (streamed, dense_mean)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


SCOPES = np.where(np.arange(ROWS) % 2, 7, np.where(np.arange(ROWS) < 8, -1, 40))
"""Right answers of a row share one, as the data contract asks."""
SCOPED = np.array([[3, -1, -1], [22, 20, -1], [5, 21, 7], [0, 2, 4]])


@pytest.mark.parametrize("devices", [None, 1, 4])
@pytest.mark.parametrize("chunk", [3, 23])
def test_only_passages_of_a_rows_own_scope_are_its_negatives(chunk: int, devices: int | None) -> None:
    mesh = None if devices is None else Mesh(np.array(jax.devices()[:devices]), ("data",))
    corpus, given = in_chunks(PASSAGES, chunk, mesh, SCOPES), batch(SCOPED)
    predicted = jnp.asarray(RNG.normal(size=(4, DIM)), jnp.float32)

    def streamed(predicted: jax.Array) -> jax.Array:
        return corpus_info_nce(predicted, given, corpus, temperature=0.1).loss

    def dense_in_scope(predicted: jax.Array) -> jax.Array:
        predicted = predicted / jnp.linalg.norm(predicted, axis=1, keepdims=True)
        logits, losses = predicted @ UNIT.T / 0.1, []
        for row, ids in zip(logits, SCOPED, strict=True):
            same = np.flatnonzero(SCOPES[ids[0]] == SCOPES)
            kept = [passage for passage in same if passage == ids[0] or passage not in ids]
            losses.append(jax.nn.logsumexp(row[jnp.array(kept)]) - row[ids[0]])
        return jnp.stack(losses)

    np.testing.assert_allclose(jax.jit(streamed)(predicted), dense_in_scope(predicted), rtol=1e-5, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda p, loss=loss: loss(p).sum())(predicted) for loss in (streamed, dense_in_scope)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    sizes = [np.sum(SCOPES[ids[0]] == SCOPES) - np.sum(ids >= 0) for ids in SCOPED]
    np.testing.assert_array_equal(corpus_info_nce(predicted, given, corpus).negatives, sizes)


def test_one_scope_for_all_is_no_scope() -> None:
    corpus = in_chunks(PASSAGES, 8, scope=np.full(ROWS, -1))
    assert corpus.scope is None
    predicted = jnp.asarray(RNG.normal(size=(4, DIM)), jnp.float32)
    plain = corpus_info_nce(predicted, batch(), in_chunks(PASSAGES, 8))
    np.testing.assert_array_equal(corpus_info_nce(predicted, batch(), corpus).loss, plain.loss)


def test_every_other_passage_is_a_negative() -> None:
    values = corpus_info_nce(jnp.ones((4, DIM)), batch(), in_chunks(PASSAGES, 8))
    np.testing.assert_array_equal(values.negatives, [22, 21, 20, 21])
    np.testing.assert_allclose(values.chance, np.log([23, 22, 21, 22]), rtol=1e-6)


def test_a_batch_that_holds_the_whole_corpus_is_the_in_batch_loss() -> None:
    everything = batch(np.arange(ROWS)[:, None])
    predicted = jnp.asarray(RNG.normal(size=(ROWS, DIM)), jnp.float32)
    ours = corpus_info_nce(predicted, everything, in_chunks(PASSAGES, 5))
    theirs = info_nce(predicted, everything)
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.negatives, theirs.negatives)


def test_passages_need_not_have_unit_norm() -> None:
    predicted = jnp.asarray(RNG.normal(size=(4, DIM)), jnp.float32)
    scaled = PASSAGES * RNG.uniform(0.1, 9, size=(ROWS, 1)).astype(np.float32)
    ours, theirs = (
        corpus_info_nce(predicted, batch(), in_chunks(some, 8)).loss for some in (PASSAGES, scaled)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_memory_grows_with_the_chunk_and_not_with_the_corpus() -> None:
    def scratch(rows: int, chunk: int) -> int:
        corpus = in_chunks(np.ones((rows, DIM), np.float32), chunk)

        def loss(predicted: jax.Array, corpus: Any) -> jax.Array:
            return corpus_info_nce(predicted, batch(), corpus).loss.sum()

        program = jax.jit(jax.grad(loss)).lower(jnp.ones((4, DIM)), corpus).compile()
        return int(program.memory_analysis().temp_size_in_bytes)

    small, large, wide = scratch(4_096, 512), scratch(65_536, 512), scratch(65_536, 8_192)
    assert large <= small + 16 * 1024  # a few bytes for each chunk's first row
    assert wide > 4 * large
