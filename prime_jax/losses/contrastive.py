"""InfoNCE: tell the right passage from the others (FR-PRED-008, FR-PRED-009; arXiv 1807.03748).

Values are per example; `objective.py` averages them.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from prime_jax.nn.attention import MASKED
from prime_jax.nn.linear import unit
from prime_jax.turns import in_turns, rejoined
from prime_jax.types import Batch


@struct.dataclass
class InfoNCE:
    """What InfoNCE says of each example.

    Attributes:
        loss: `-log softmax` of the right passage among the candidates, in nats, `[B]`.
        negatives: How many negatives the row really saw after masking, `[B]`.
    """

    loss: Float[Array, "*a B"]
    negatives: Int[Array, "*a B"]

    @property
    def chance(self) -> Float[Array, "*a B"]:
        """The loss of a guess that finds all candidates alike, `log(1 + negatives)`, `[B]`."""
        return jnp.log1p(self.negatives.astype(jnp.float32))


def info_nce(
    predicted: Float[Array, "B E"],
    batch: Batch,
    *,
    temperature: float | Float[Array, ""] = 0.07,
    turns: int = 1,
) -> InfoNCE:
    """InfoNCE against in-batch negatives and, where the batch has them, each row's explicit negatives.

    A candidate whose passage id is one of the row's right answers is no negative and is left out; so is an
    empty negative slot (id -1). A row whose candidates are all masked has loss 0. Where the batch has
    `positives`, the loss of a row is the mean over its right answers, each told from the negatives alone
    (the outer sum of arXiv 2004.11362).

    Args:
        predicted: Predictions, `[B, E]`; normalised here.
        batch: Targets, ids and explicit negatives.
        temperature: Divides the cosine similarities; 0.07 (BR-PRED-003).
        turns: Compute the `[B, B]` similarities a share of the rows at a time, so that they take a
            `turns`-th of the memory. The values are the same.
    """
    targets, ids = unit(batch.target), batch.target_id

    def of_rows(rows: tuple[Array, Batch]) -> InfoNCE:
        return _info_nce(*rows, targets, ids, temperature)

    if turns == 1:
        return of_rows((unit(predicted), batch))
    compared = batch._replace(context=None, context_mask=None, query=None, example=None)  # type: ignore[arg-type]
    parts: InfoNCE = jax.lax.map(jax.checkpoint(of_rows), in_turns((unit(predicted), compared), turns))
    whole: InfoNCE = rejoined(parts)
    return whole


@jax.named_scope("info_nce")
def _info_nce(
    predicted: Float[Array, "b E"],
    batch: Batch,
    targets: Float[Array, "B E"],
    ids: Int[Array, " B"],
    temperature: float | Float[Array, ""],
) -> InfoNCE:
    """InfoNCE of some rows of a batch against all targets of the whole."""
    others = predicted @ targets.T
    wrong = ~_is_positive(ids[None, :], batch)
    if batch.negatives is not None:
        if batch.negative_ids is None:
            raise ValueError("a batch with negatives needs negative_ids")
        explicit = jnp.einsum("be,bke->bk", predicted, unit(batch.negatives))
        usable = (batch.negative_ids >= 0) & ~_is_positive(batch.negative_ids, batch)
        others = jnp.concatenate([others, explicit], axis=1)
        wrong = jnp.concatenate([wrong, usable], axis=1)
    others = jnp.where(wrong, others / temperature, MASKED)
    if batch.positives is None:
        right = jnp.einsum("be,be->b", predicted, unit(batch.target))[:, None] / temperature
        everything = jax.nn.logsumexp(jnp.concatenate([right, others], axis=1), axis=1)
        loss = everything - right[:, 0]
    else:
        loss = mean_over_answers(predicted / temperature, batch, jax.nn.logsumexp(others, axis=1))
    return InfoNCE(loss=loss, negatives=jnp.sum(wrong, axis=1))


@jax.named_scope("info_nce")
def mean_over_answers(
    predicted: Float[Array, "b E"], batch: Batch, wrong: Float[Array, " b"]
) -> Float[Array, " b"]:
    """The mean over a row's right answers of `-log softmax` of that one among itself and the negatives.

    Args:
        predicted: Unit-norm predictions, divided by the temperature.
        batch: With `positives`.
        wrong: Log-sum-exp of the negatives' similarities, divided by the temperature.
    """
    assert batch.positives is not None
    right = jnp.einsum("be,bpe->bp", predicted, unit(batch.positives))
    real = batch.positive_ids >= 0
    each = jnp.logaddexp(right, wrong[:, None]) - right
    return jnp.sum(jnp.where(real, each, 0.0), axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)


def _is_positive(ids: Int[Array, "#b C"], batch: Batch) -> Bool[Array, "b C"]:
    """Whether a candidate `[b or 1, C]` is one of the row's right answers."""
    return jnp.any(ids[:, :, None] == batch.positive_ids[:, None, :], axis=-1)
