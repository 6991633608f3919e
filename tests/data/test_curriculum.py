"""Which steering a row gets: the shares, on draws, and that nothing but seed and place decides."""

from pathlib import Path

import numpy as np
import pytest
from fakes import BagOfWords
from topics import TOPICS, open_topics, topics

from prime_jax.data.curriculum import Curriculum, SteeredRows
from prime_jax.data.pipeline import TrainingBatches
from prime_jax.data.steered import open_steering, steered, variant_code
from prime_jax.data.steering import build_steering
from prime_jax.errors import ConfigError
from prime_jax.types import Batch

THREE = Curriculum(("centroid", "keyword", "residual"))
DRAWS = 60_000  # one standard deviation of a share of a half is 0.002


@pytest.mark.parametrize(
    ("epoch", "zero"), [(0.0, 0.5), (25.0, 0.4), (50.0, 0.3), (99.5, 0.102), (100.0, 0.1), (400.0, 0.1)]
)
def test_rows_without_steering_go_from_a_half_to_a_tenth_over_100_epochs(epoch: float, zero: float) -> None:
    """The rest is shared equally among the variants."""
    assert THREE.zero_share(epoch) == pytest.approx(zero)
    shares = np.bincount(THREE.draw(3, DRAWS, seed=1, epoch=epoch), minlength=5) / DRAWS
    rest = (1 - zero) / 3
    np.testing.assert_allclose(shares, [zero, rest, rest, rest, 0.0], atol=0.01)


def test_shares_and_variants_are_as_configured() -> None:
    """Codes are those of the names, in whatever order they are given."""
    two = Curriculum(("predicted", "keyword"), zero_start=0.2, zero_end=0.8, zero_epochs=10.0)
    drawn = two.draw(0, DRAWS, seed=0, epoch=5.0)
    shares = {code: float(np.mean(drawn == code)) for code in np.unique(drawn)}
    expected = {0: 0.5, variant_code("keyword"): 0.25, variant_code("predicted"): 0.25}
    assert shares == pytest.approx(expected, abs=0.01)
    always, never = (Curriculum(("keyword",), share, share) for share in (0.0, 1.0))
    assert set(always.draw(0, 100, seed=0, epoch=0.0)) == {variant_code("keyword")}
    assert set(never.draw(0, 100, seed=0, epoch=0.0)) == {0}


def test_only_seed_and_place_decide() -> None:
    first = THREE.draw(5, 100, seed=3, epoch=1.0)
    np.testing.assert_array_equal(first, THREE.draw(5, 100, seed=3, epoch=1.0))
    for other in (THREE.draw(6, 100, seed=3, epoch=1.0), THREE.draw(5, 100, seed=4, epoch=1.0)):
        assert 0.2 < np.mean(first != other) < 0.95
    later = THREE.draw(5, 100, seed=3, epoch=100.0)  # more rows have steering; those that had it keep theirs
    np.testing.assert_array_equal(later[first > 0], first[first > 0])
    assert (later == 0).sum() < (first == 0).sum()


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="no steering 'thin air'"):
        Curriculum(("thin air",)).draw(0, 4, seed=0, epoch=0.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> SteeredRows:
    folder: Path = tmp_path_factory.mktemp("curriculum")
    topics(folder)
    build_steering(folder, BagOfWords(), clusters=TOPICS)
    data = open_topics(folder)
    steering = open_steering(folder / "steering", data, "bag-of-words")
    falling = Curriculum(("centroid", "keyword", "residual"), 0.9, 0.1, 4.0)
    return SteeredRows(steered(data, steering, "zero"), "train", steering, falling)


def batches(rows: SteeredRows, *, index: int = 0, count: int = 1, start: int = 0) -> list[Batch]:
    stream = TrainingBatches(
        rows.data,
        "train",
        batch_size=8,
        seed=2,
        epochs=5,
        process_index=index,
        process_count=count,
        steering=rows,
    )
    stream.seek(start)
    return list(stream)


def test_processes_share_what_one_would_draw(rows: SteeredRows) -> None:
    """Steering, its vector and its mask, clusters and negatives: the halves are those of the whole batch."""
    alone, first, second = batches(rows), batches(rows, count=2), batches(rows, index=1, count=2)
    for whole, left, right in zip(alone, first, second, strict=True):
        for name, values in whole._asdict().items():
            if values is not None:
                halves = [getattr(left, name), getattr(right, name)]
                np.testing.assert_array_equal(np.concatenate(halves), values, err_msg=name)


def test_the_stream_goes_on_where_it_was(rows: SteeredRows) -> None:
    """A resumed run draws what it would have drawn, at the epoch where it would have."""
    for whole, resumed in zip(batches(rows)[7:], batches(rows, start=7), strict=True):
        np.testing.assert_array_equal(whole.steering, resumed.steering)
        np.testing.assert_array_equal(whole.context, resumed.context)


def test_batches_follow_the_curriculum_and_carry_what_was_drawn(rows: SteeredRows) -> None:
    """Fewer and fewer rows are without; the turn is the drawn vector of the row's own pair."""
    stream = batches(rows)
    steps = len(stream) // 5
    without = [np.mean([b.steering == 0 for b in stream[at : at + steps]]) for at in (0, 4 * steps)]
    assert without[0] > 0.65
    assert without[1] < 0.25
    vectors, clusters = rows.steering.vectors("train"), rows.steering.clusters("train")
    pairs = {
        (example, int(answer)): (vectors[at], clusters[at])
        for at, (example, answer) in enumerate(
            (example, answer)
            for example, answers in enumerate(rows.data.splits["train"].positives)
            for answer in answers
        )
    }
    for batch in stream:
        for row, code in enumerate(batch.steering):
            own, cluster = pairs[int(batch.example[row]), int(batch.target_id[row])]
            expected = np.zeros_like(own[0]) if code == 0 else own[code - 1]
            np.testing.assert_array_equal(batch.context[row, 0], expected)
            assert batch.context_mask[row, 0] == expected.any()
            assert batch.cluster[row] == cluster
