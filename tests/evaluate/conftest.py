"""A small evaluation in which the turns know the answer and the query hardly does."""

import numpy as np
import pytest

from prime_jax.evaluate.arrays import Corpus, Split
from prime_jax.evaluate.evaluation import Evaluation, evaluate_methods
from prime_jax.evaluate.report import Texts
from prime_jax.retrieval.vectors import unit

QUERIES, PASSAGES = 24, 150


@pytest.fixture(scope="session")
def passages() -> np.ndarray:
    return unit(np.random.default_rng(1).normal(size=(PASSAGES, 6)))


@pytest.fixture(scope="session")
def evaluation(passages: np.ndarray) -> Evaluation:
    rng = np.random.default_rng(0)
    corpus = Corpus(passages)

    def part(rows: int) -> tuple[Split, np.ndarray]:
        right = rng.permutation(PASSAGES)[:rows]
        answer = corpus.embeddings[right]
        context = np.stack([rng.normal(size=(rows, 6)), answer + rng.normal(0, 0.4, (rows, 6))], axis=1)
        query = unit(0.6 * answer + 0.3 * rng.normal(size=(rows, 6)))
        positives = [np.array([row]) for row in right]
        return Split(query, context.astype(np.float32), np.ones((rows, 2), bool), positives), answer

    train, dev, (test, answer) = part(60)[0], part(30)[0], part(QUERIES)
    predicted = unit(answer + rng.normal(0, 0.05, answer.shape))
    groups = np.arange(QUERIES) // 2
    return evaluate_methods(
        "test", test, predicted, train=train, dev=dev, corpus=corpus, seed=0, groups=groups
    )


@pytest.fixture(scope="session")
def texts() -> Texts:
    return Texts(
        query_ids=[f"q{number}" for number in range(QUERIES)],
        queries=[f"what about <b>{number}</b> | & more?" for number in range(QUERIES)],
        last_turns=["", *(f"turn {number}" for number in range(1, QUERIES))],
        passage_ids=[f"p{number}" for number in range(PASSAGES)],
        passages=[f"passage <{number}> " + "long " * 100 for number in range(PASSAGES)],
    )
