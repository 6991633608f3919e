"""The pytrees every part speaks.

Axis names used throughout: B batch, N = max_context_length turns (oldest first), D input dimension, H hidden
dimension, E output dimension, K explicit negatives or subspaces, P positives of one example, M corpus size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Texts(NamedTuple):
    """Texts as token ids, padding behind them.

    Attributes:
        tokens: `[..., T]`; padding is 0.
        lengths: How many of a text's tokens are real, `[...]`; 0 for no text.
    """

    tokens: Int[Array, "*a T"]
    lengths: Int[Array, "*a"]


class BatchTexts(NamedTuple):
    """The texts of a batch, for encoders that are trained: turns and query together, and the passage.

    Attributes:
        asked: Turns, oldest first, then the query, `[B, N + 1]` texts.
        passage: The passage to predict, `[B]` texts.
    """

    asked: Texts
    passage: Texts


SEQUENCES_PER_ROW = 8
"""Most sequences in a row of `Conversations`."""


class Conversations(NamedTuple):
    """Conversations as token ids, each one sequence, packed into R rows of S tokens.

    Attributes:
        tokens: `[R, S]`; padding is 0.
        segments: Which sequence of its row a token belongs to, counted from 1; 0 is padding, `[R, S]`.
        positions: Of the tokens in their sequences, from 0, `[R, S]`.
        slots: Where the sequence of each example is: its row times `SEQUENCES_PER_ROW`, plus its number in
            the row, from 0, `[B]`.
    """

    tokens: Int[Array, "*a R S"]
    segments: Int[Array, "*a R S"]
    positions: Int[Array, "*a R S"]
    slots: Int[Array, "*a B"]


class Batch(NamedTuple):
    """One training batch; JAX arrays in a step, numpy arrays before it.

    Attributes:
        context: Turn embeddings, oldest first, `[B, N, D]`; padded slots hold anything (they are masked).
        context_mask: True where a turn is real, `[B, N]`.
        query: Query embeddings, `[B, D]`.
        target: Embedding of the passage to predict, unit norm, `[B, E]`.
        target_id: Corpus row of `target`, `[B]`.
        positive_ids: Corpus rows of every right answer of the example, -1 where there is none, `[B, P]`.
            Contains `target_id`. They are never counted as negatives.
        negatives: Explicit negatives, `[B, K, E]`, or None.
        negative_ids: Corpus rows of `negatives`, -1 where a slot is empty, `[B, K]`, or None.
        example: Row of each example in its split, `[B]`, so that an error can name it.
        positives: Embeddings of every right answer, beside `positive_ids`, `[B, P, E]`, or None where a row
            has the one in `target` to find.
        cluster: Cluster of `target`, `[B]`, or None where the data has none (JASPER only).
        steering: Which steering each row has: 0 for zero, then the variants in their order, `[B]`, or None.
        texts: The texts themselves, where encoders are trained, or None.
        conversations: Turns and queries as token ids, for a model that reads text, or None.
    """

    context: Float[Array, "*a B N D"]
    context_mask: Bool[Array, "*a B N"]
    query: Float[Array, "*a B D"]
    target: Float[Array, "*a B E"]
    target_id: Int[Array, "*a B"]
    positive_ids: Int[Array, "*a B P"]
    example: Int[Array, "*a B"]
    negatives: Float[Array, "*a B K E"] | None = None
    negative_ids: Int[Array, "*a B K"] | None = None
    positives: Float[Array, "*a B P E"] | None = None
    cluster: Int[Array, "*a B"] | None = None
    steering: Int[Array, "*a B"] | None = None
    texts: BatchTexts | None = None
    conversations: Conversations | None = None

    def map_targets(self, change: Callable[[Array], Array]) -> "Batch":
        """The batch with all that predictions are compared with changed: target, negatives, positives."""
        changed: dict[str, Any] = {
            name: change(vectors)
            for name in ("target", "negatives", "positives")
            if (vectors := getattr(self, name)) is not None
        }
        return self._replace(**changed)


class Prediction(NamedTuple):
    """What a model answers, with whatever else losses and explanations need of it.

    Attributes:
        embedding: Unit-norm predictions, `[B, E]`.
        logits: Of the router over K subspaces, `[B, K]`, or None without one.
        routing: Weights of the subspaces, `[B, K]`; rows sum to 1.
        coarse: Mix of the centroids by these weights, `[B, E]`.
        fine: What leads from there to the prediction, `[B, E]`: `embedding == coarse + fine`.
    """

    embedding: Float[Array, "*a B E"]
    logits: Float[Array, "*a B K"] | None = None
    routing: Float[Array, "*a B K"] | None = None
    coarse: Float[Array, "*a B E"] | None = None
    fine: Float[Array, "*a B E"] | None = None
