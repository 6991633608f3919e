"""How the dtype of a compiled shape is chosen."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from prime_jax.errors import PredictorError
from prime_jax.predict import precision as subject
from prime_jax.predict.precision import EXACT, Recipe, choose

HALF = Recipe("bfloat16", "float32")
LARGE = 50_000_000


class Run:
    """A run that says itself how long it takes, so that nothing here depends on a clock."""

    def __init__(self, seconds: float, answer: list[float]) -> None:
        self.seconds, self.answer = seconds, answer

    def __call__(self) -> jax.Array:
        return jnp.array([self.answer])


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_median_seconds", lambda run: run.seconds)


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


def test_by_hand_the_best_of_several_bfloat16_recipes_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where cuDNN's attention may or may not pay; slower than float32, it is still taken."""
    fused = Recipe("bfloat16", "cudnn")
    monkeypatch.setattr(subject, "half_recipes", lambda: (HALF, fused))

    def prepare(recipe: Recipe) -> Any:
        return Run({EXACT: 0.001, HALF: 0.05, fused: 0.02}[recipe], [1.0, 0.0])

    choice = choose("bfloat16", LARGE, prepare)
    assert choice.recipe == fused
    assert choice.why == (
        "set by hand; measured: float32 1.0 ms, bfloat16 50.0 ms, bfloat16 with cuDNN attention 20.0 ms"
    )
    assert choose("auto", LARGE, prepare).recipe == EXACT
