"""How the dtype of a compiled shape is chosen."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from prime_jax.errors import PredictorError
from prime_jax.predict import precision as subject
from prime_jax.predict.precision import EXACT, Choice, Recipe, choose, choose_all, timed, transposed_pays

HALF = Recipe("bfloat16", "float32", outputs_first=True)
LARGE = 50_000_000


class Run:
    """A run that says itself how long it takes, so that nothing here depends on a clock."""

    def __init__(self, seconds: float | list[float], answer: list[float]) -> None:
        self.times = itertools.repeat(seconds) if isinstance(seconds, float) else iter(seconds)
        self.answer = answer

    def __call__(self) -> jax.Array:
        return jnp.array([self.answer])


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_seconds", lambda run: next(run.times))


def prepared(slow: float, fast: float, *, stray: bool = False) -> Any:
    """Runs of float32 and bfloat16; the latter may point elsewhere."""

    def prepare(recipe: Recipe) -> Run:
        if recipe == EXACT:
            return Run(slow, [1.0, 0.0])
        return Run(fast, [0.0, 1.0] if stray else [1.0, 0.0])

    return prepare


def never(recipe: Recipe) -> Any:
    raise AssertionError("nothing is measured")


def test_the_faster_one_is_taken_and_the_times_are_told() -> None:
    choice = choose("auto", LARGE, prepared(slow=0.05, fast=0.005))
    assert choice.recipe == HALF
    assert choice.why == "measured: float32 50.0 ms, bfloat16 5.0 ms"


def test_a_small_gain_is_not_worth_the_fourth_digit() -> None:
    assert choose("auto", LARGE, prepared(slow=0.05, fast=0.045)).recipe == EXACT


def test_small_models_stay_exact_unmeasured() -> None:
    choice = choose("auto", 4_000_000, never)
    assert choice.recipe == EXACT
    assert "under 10,000,000 parameters" in choice.why


def test_predictions_that_stray_are_refused() -> None:
    choice = choose("auto", LARGE, prepared(slow=0.05, fast=0.005, stray=True))
    assert choice.recipe == EXACT
    assert "bfloat16 strays (cosine 0.0000)" in choice.why


def test_a_kernel_that_is_not_there_is_passed_over() -> None:
    def prepare(recipe: Recipe) -> Any:
        if recipe == HALF:
            raise NotImplementedError("no such kernel")
        return prepared(slow=0.0, fast=0.0)(recipe)

    choice = choose("auto", LARGE, prepare)
    assert choice.recipe == EXACT
    assert "bfloat16 is not available (NotImplementedError)" in choice.why


def test_set_by_hand() -> None:
    assert choose("float32", LARGE, never) == (EXACT, "set by hand")
    assert choose("bfloat16", LARGE, never) == (HALF, "set by hand")


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(PredictorError, match="precision 'float16' is unknown; choose from auto"):
        choose("float16", LARGE, never)  # type: ignore[arg-type]


def test_a_slow_moment_decides_nothing() -> None:
    """Runs take turns and the fastest of each counts: here float32 is undisturbed once in five runs."""
    assert timed(Run([0.09, 0.09, 0.05, 0.09, 0.09], [1.0]), Run([0.02] * 5, [1.0])) == (0.05, 0.02)


def test_where_it_is_close_more_runs_decide() -> None:
    """After five rounds bfloat16 needs 0.84 of the time, near the limit of 0.8; in the ninth half."""
    half = Run([0.084] * 8 + [0.05] * 12, [1.0])
    assert timed(Run([0.1] * 20, [1.0]), half) == (0.1, 0.05)
    assert len(list(half.times)) == 20 - 9
    clear = Run([0.05] * 20, [1.0])
    timed(Run([0.1] * 20, [1.0]), clear)
    assert len(list(clear.times)) == 20 - 5


@pytest.mark.parametrize(
    ("winners", "measured"),
    [({1: HALF, 32: HALF}, [1, 32]), ({1: HALF, 8: EXACT, 16: HALF, 32: EXACT}, [1, 32, 8, 16])],
)
def test_sizes_in_between_are_measured_only_where_the_ends_differ(
    winners: dict[int, Recipe], measured: list[int]
) -> None:
    asked: list[int] = []

    def choose_one(size: int) -> Choice:
        asked.append(size)
        return Choice(winners[size], "measured")

    chosen = choose_all((1, 8, 16, 32), choose_one)
    assert asked == measured
    assert list(chosen) == [1, 8, 16, 32]
    assert {size: chosen[size].recipe for size in winners} == winners
    if len(measured) == 2:
        assert chosen[8] == Choice(HALF, "as for batches of 1 and 32")


def test_on_a_gpu_the_smallest_size_says_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "on_gpu", lambda: True)
    asked: list[int] = []
    chosen = choose_all((1, 8, 32), lambda size: (asked.append(size), Choice(HALF, "measured"))[1])
    assert asked == [1]
    assert chosen[32] == Choice(HALF, "as for batches of 1")


def test_on_a_gpu_float32_for_the_smallest_size_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "on_gpu", lambda: True)
    winners = {1: EXACT, 8: HALF, 32: HALF}
    chosen = choose_all((1, 8, 32), lambda size: Choice(winners[size], "measured"))
    assert {size: choice.recipe for size, choice in chosen.items()} == winners


def test_one_size_is_measured_once() -> None:
    asked: list[int] = []
    choose_all((4,), lambda size: (asked.append(size), Choice(EXACT, ""))[1])
    assert asked == [4]


@pytest.mark.parametrize(
    ("transposed", "pays"),
    [([0.5, 0.9], True), ([0.5, 1.2], False), ([0.95, 0.95], False), ([0.2, 1.0], True)],
)
def test_float32_is_laid_out_as_products_are_fastest(
    transposed: list[float], pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As times say it, given here for a few rows and for many; lying `[I, O]` takes one second."""
    ticks: list[float] = []
    for share in transposed:
        for _ in range(6):
            ticks += [0.0, 1.0, 0.0, share]
    clock = iter(ticks)
    monkeypatch.setattr(subject.time, "perf_counter", lambda: next(clock))
    assert transposed_pays((2, 4), 8, 16) is pays
