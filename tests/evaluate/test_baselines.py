import numpy as np
import pytest
from sklearn.linear_model import Ridge

from prime_jax.errors import DataError
from prime_jax.evaluate import baselines, linear
from prime_jax.evaluate.arrays import Corpus, Split, mean_turn
from prime_jax.evaluate.evaluation import baselines as every_baseline
from prime_jax.retrieval.metrics import ranking_metrics
from prime_jax.retrieval.mix import ages
from prime_jax.retrieval.vectors import unit

EAST, NORTH, UP = np.eye(3, dtype=np.float32)


def split(query, turns, positives, **more) -> Split:
    """Rows of turns of different lengths, padded with a value that must never be looked at."""
    longest = max(map(len, turns))
    context = np.full((len(query), longest, 3), 99, np.float32)
    mask = np.zeros((len(query), longest), bool)
    for row, some in enumerate(turns):
        context[row, : len(some)] = np.reshape(some, (-1, 3))
        mask[row, : len(some)] = True
    rows = [np.array([positive]) for positive in positives]
    return Split(np.stack(query), context, mask, rows, **more)


SPLIT = split([EAST, EAST], [[NORTH, UP], []], [1, 0])


def vectors(baseline: baselines.Baseline, on: Split = SPLIT, **settings: float) -> np.ndarray:
    return baseline.prepare(on)(settings)


def test_mean_context_by_hand():
    # East + 2 * (north + up) / 2 = (1, 1, 1); without turns the query stays as it is.
    found = vectors(baselines.mean_context(), weight=2.0)
    np.testing.assert_allclose(found, [np.ones(3) / np.sqrt(3), EAST], atol=1e-6)


def test_recency_mix_by_hand():
    # The last turn (up) has age 0, the one before age 1: east + 2 * (up + north / 2) = (1, 1, 2).
    found = vectors(baselines.recency_mix(), weight=2.0, decay=0.5)
    np.testing.assert_allclose(found, [np.array([1, 1, 2]) / np.sqrt(6), EAST], atol=1e-6)
    # Decay 0 looks at the last turn alone.
    found = vectors(baselines.recency_mix(), weight=1.0, decay=0.0)
    np.testing.assert_allclose(found, [np.array([1, 0, 1]) / np.sqrt(2), EAST], atol=1e-6)


def test_turns_may_be_padded_on_either_side():
    left = SPLIT._replace(
        context=np.roll(SPLIT.context, 1, axis=1), mask=np.array([[True, True], [False, False]])
    )
    assert ages(left.mask)[0].tolist() == [1, 0]
    one = SPLIT._replace(mask=np.array([[False, True], [True, False]]), context=np.tile(NORTH, (2, 2, 1)))
    assert (ages(one.mask)[0, 1], ages(one.mask)[1, 0]) == (0, 0)
    np.testing.assert_array_equal(mean_turn(one), [NORTH, NORTH])


def test_rocchio_by_hand():
    corpus = Corpus(np.stack([EAST, unit(EAST + NORTH), UP]))
    on = SPLIT._replace(exclude=[np.array([0]), np.array([], np.int64)])
    found = vectors(baselines.rocchio(corpus), on, k=1, beta=1.0)
    # Row 0 may not see the passage east, so the diagonal is fed back; row 1 gets its own direction back.
    np.testing.assert_allclose(found, [unit(EAST + unit(EAST + NORTH)), EAST], atol=1e-6)


def test_average_feedback_by_hand():
    corpus = Corpus(np.stack([EAST, unit(EAST + NORTH), UP]))
    on = SPLIT._replace(exclude=[np.array([0]), np.array([], np.int64)])
    found = vectors(baselines.average_feedback(corpus), on, k=2)
    # The mean of the query and of the two passages nearest to it that it may see.
    second = unit(EAST + NORTH)
    np.testing.assert_allclose(found, [unit(EAST + second + UP), unit(EAST + EAST + second)], atol=1e-6)


def test_rocchio_averages_only_what_was_found():
    corpus = Corpus(np.stack([NORTH, UP]), np.array([0, 1]))
    on = SPLIT._replace(scope=np.array([0, 2]))
    found = vectors(baselines.rocchio(corpus), on, k=10, beta=1.0)
    np.testing.assert_allclose(found, [unit(EAST + NORTH), EAST], atol=1e-6)


def test_ridge_solver_equals_scikit_learn():
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(1, 1, (40, 6)), rng.normal(2, 1, (40, 4))
    solve = linear.ridge_solver(inputs, targets)
    for penalty in (0.1, 1.0, 100.0):
        expected = Ridge(alpha=penalty).fit(inputs, targets)
        weight, bias = solve(penalty)
        np.testing.assert_allclose(weight, expected.coef_.T, atol=1e-9)
        np.testing.assert_allclose(bias, expected.intercept_, atol=1e-9)


def test_ridge_recovers_a_linear_map_that_the_query_does_not_know():
    rng = np.random.default_rng(0)
    corpus = Corpus(unit(rng.normal(size=(300, 8))))
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)

    def part(rows: range) -> Split:
        positives = [np.array([row]) for row in rows]
        return Split(corpus.embeddings[rows] @ turn, np.zeros((len(rows), 1, 8), np.float32),
                     np.zeros((len(rows), 1), bool), positives)  # fmt: skip

    train, dev = part(range(200)), part(range(200, 300))
    plain = baselines.tune(baselines.query(), dev, corpus)[1]
    settings, mapped = baselines.tune(linear.ridge(train, corpus), dev, corpus)
    assert plain < 0.2
    assert mapped == 1.0
    assert settings["penalty"] <= 100


def test_ridge_context_uses_turns_the_query_map_cannot_see():
    rng = np.random.default_rng(0)
    corpus = Corpus(unit(rng.normal(size=(300, 8))))

    def part(rows: range) -> Split:
        noise = rng.normal(size=(len(rows), 8)).astype(np.float32)
        context = np.stack([noise, corpus.embeddings[rows]], axis=1)
        positives = [np.array([row]) for row in rows]
        return Split(unit(noise), context, np.ones((len(rows), 2), bool), positives)

    train, dev = part(range(200)), part(range(200, 300))
    assert baselines.tune(linear.ridge(train, corpus), dev, corpus)[1] < 0.2
    assert baselines.tune(linear.ridge_context(train, corpus), dev, corpus)[1] > 0.95


def test_tuning_takes_the_best_and_of_equals_the_simpler():
    # The turn points at the right passage: any weight above 1 finds it first, any below does not.
    corpus = Corpus(np.stack([EAST, NORTH, *[UP] * 10]))
    dev = split([EAST, EAST], [[NORTH], [NORTH]], [1, 1])
    settings, mrr = baselines.tune(baselines.mean_context(), dev, corpus)
    assert (settings, mrr) == ({"weight": 1.25}, 1.0)
    # Where the context cannot help, the plain query is kept.
    settings, mrr = baselines.tune(
        baselines.recency_mix(), dev._replace(positives=[np.array([0])] * 2), corpus
    )
    assert (settings, mrr) == ({"weight": 0.0, "decay": 0.0}, 1.0)


def test_tuning_respects_exclusions_and_scopes():
    corpus = Corpus(np.stack([EAST, EAST, unit(EAST + 0.1 * NORTH)]), np.array([0, 1, 1]))
    dev = split([EAST], [[]], [2], exclude=[np.array([1])], scope=np.array([1]))
    assert baselines.tune(baselines.query(), dev, corpus)[1] == 1.0
    assert baselines.tune(baselines.query(), dev._replace(exclude=None), corpus)[1] == 0.5


def test_the_tuning_score_is_the_metric_of_the_report(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(3)
    corpus = Corpus(unit(rng.normal(size=(60, 3))))
    dev = split(list(unit(rng.normal(size=(9, 3)))), [[NORTH]] * 9, range(9))
    settings, mrr = baselines.tune(baselines.mean_context(), dev, corpus)
    monkeypatch.setattr(
        "prime_jax.retrieval.tuning._ROWS_PER_SEARCH", 20
    )  # two settings at a time change nothing
    assert baselines.tune(baselines.mean_context(), dev, corpus) == (settings, mrr)
    found = baselines.retrieve(vectors(baselines.mean_context(), dev, **settings), dev, corpus, 10)[1]
    assert mrr == pytest.approx(ranking_metrics(found, dev.positives)["MRR@10"].mean(), abs=1e-12)


def test_last_turn_concat_is_there_only_where_it_was_encoded():
    corpus = Corpus(np.stack([EAST, NORTH]))
    encoded = SPLIT._replace(last_turn=np.stack([2 * UP, EAST]))
    names = [baseline.name for baseline in every_baseline(SPLIT, SPLIT, corpus)]
    assert "last_turn_concat" not in names
    assert "conversation_text" not in names
    whole = SPLIT._replace(conversation=np.stack([2 * UP, EAST]))
    assert "conversation_text" in [baseline.name for baseline in every_baseline(SPLIT, whole, corpus)]
    mixed = baselines.conversation_text().prepare(whole)({"weight": 1.0})
    np.testing.assert_allclose(mixed, unit(np.stack([UP, EAST]) + unit(SPLIT.query)), atol=1e-6)
    with pytest.raises(DataError, match="no encoded text of its conversations"):
        vectors(baselines.conversation_text())
    assert "last_turn_concat" in [baseline.name for baseline in every_baseline(SPLIT, encoded, corpus)]
    np.testing.assert_array_equal(vectors(baselines.last_turn_concat(), encoded), [UP, EAST])
    with pytest.raises(DataError, match="no encoded"):
        vectors(baselines.last_turn_concat())


def test_queries_and_passages_in_different_spaces_are_refused():
    with pytest.raises(DataError, match="queries have 3 dimensions, passages 2"):
        every_baseline(SPLIT, SPLIT, Corpus(np.ones((4, 2), np.float32)))
