"""What a predictor compiles: failures that pass, choices that stay, programs that are not kept."""

import threading
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import pytest
from predictors import make, requests

from prime_jax.errors import PredictorError
from prime_jax.predict import precision, programs
from prime_jax.predict.precision import EXACT, Choice, Recipe
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.programs import Programs, _once

HALF = Recipe("bfloat16", "float32", outputs_first=True)


def predictor(kind: Any = "float32", **fields: Any) -> Predictor:
    model = make(num_layers=1, max_batch_size=2, **{"use_torch_compile": False} | fields)
    return Predictor.from_model(model, precision=kind, batch_sizes=(1,))


@pytest.mark.parametrize("method", ["_traced", "_lay_out"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_a_failure_is_not_kept(
    method: str, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or too little memory at that moment: the next call compiles."""
    served = predictor()

    def fail(*_: Any) -> Any:
        raise failure

    with monkeypatch.context() as failing:
        failing.setattr(Programs, method, fail)
        with pytest.raises(failure):
            served.predict(*requests(1))
    np.testing.assert_array_equal(served.predict(*requests(1)), predictor().predict(*requests(1)))


def test_who_waits_for_an_interrupted_compilation_gets_an_ordinary_error() -> None:
    kept: dict[str, Future[int]] = {}
    waiting: list[Future[int]] = []

    def interrupted() -> int:
        waiting.append(_once(lock, kept, "program", lambda: 1))
        raise KeyboardInterrupt

    lock = threading.Lock()
    with pytest.raises(KeyboardInterrupt):
        _once(lock, kept, "program", interrupted)
    with pytest.raises(PredictorError, match="interrupted while it compiled this; try again"):
        waiting[0].result(0)
    assert _once(lock, kept, "program", lambda: 2).result(0) == 2


def test_weights_that_do_not_fit_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in bfloat16 beside the float32 weights may be too much for a device."""
    monkeypatch.setattr(precision, "MEASURED_FROM", 0)
    monkeypatch.setattr(Programs, "_transposed", lambda _: False)
    lay_out = Programs._lay_out

    def full(programs: Programs, recipe: Recipe) -> Any:
        if recipe == HALF:
            raise MemoryError
        return lay_out(programs, recipe)

    monkeypatch.setattr(Programs, "_lay_out", full)
    told = predictor("auto", use_torch_compile=True).info()["precision"]
    assert {row["dtype"] for row in told.values()} == {EXACT.dtype}
    assert "bfloat16 is not available (MemoryError)" in told[1]["why"]


def test_float32_set_by_hand_depends_on_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes float32 matrices as they are read fastest; evaluation and export ask for `float32`."""
    monkeypatch.setattr(precision, "MEASURED_FROM", 0)
    monkeypatch.setattr(programs, "MEASURED_FROM", 0)
    monkeypatch.setattr(programs, "transposed_pays", lambda *_: True)
    pinned = predictor()
    pinned.predict(*requests(2))
    assert pinned._programs.recipes == {EXACT}
    free = predictor("auto")
    assert free._programs.exact("auto") == EXACT._replace(outputs_first=True)
    assert free._programs.choose(2, "float32").recipe == EXACT


def test_warming_up_keeps_what_an_earlier_request_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `info` says of a size is what its requests run, though the machine would now choose otherwise."""
    monkeypatch.setattr(precision, "MEASURED_FROM", 0)
    served = predictor("auto")
    measured: list[int] = []

    def choose(size: int, precision: str) -> Choice:
        measured.append(size)
        return Choice(EXACT if len(measured) == 1 else HALF, f"measurement {len(measured)}")

    monkeypatch.setattr(served._programs, "choose", choose)
    served.predict(*requests(2))
    before = served._programs.fixed(2)
    served.warmup()
    assert measured == [2, 1]
    assert {size: row["dtype"] for size, row in served.info()["precision"].items()} == {
        1: "bfloat16",
        2: "float32",
    }
    assert served._programs.fixed(2) is before
    assert served._programs.recipes == {EXACT, HALF}


def test_a_session_measures_once_and_keeps_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "MEASURED_FROM", 0)
    measured: list[Any] = []
    monkeypatch.setattr(precision, "_seconds", lambda run: (measured.append(run), 1.0)[1])
    served = predictor("float32", use_torch_compile=True)
    shapes = served._programs.shapes
    first = served.session(3, precision="auto")
    rounds = len(measured)
    assert rounds > 0
    assert served.session(3, precision="auto")._programs is first._programs
    assert len(measured) == rounds
    assert served._programs.shapes == shapes  # none for a batch of three
    assert set(served._programs._weights) == {("float32", False)}  # bfloat16 was not worth it


def test_a_first_request_drops_what_lost_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "MEASURED_FROM", 0)
    monkeypatch.setattr(precision, "_seconds", lambda run: 1.0)
    served = predictor("auto")
    served.predict(*requests(2))
    assert served._programs.recipes == {EXACT}


def test_programs_run_on_the_device_of_the_thread_that_asks_for_them() -> None:
    """Though other threads compile them: `jax.default_device` is a setting of one thread."""
    chosen = jax.devices()[1]
    with jax.default_device(chosen):
        served = predictor(use_torch_compile=True, context_attention="causal")
        answer = served._programs.fixed(1).start(*requests(1))._answer
        session = served.session()
        assert answer.devices() == {chosen}
        assert {leaf.device for leaf in jax.tree.leaves(session._programs.empty())} == {chosen}
        programs = session._programs._advance.values()
        placed = [jax.tree.leaves(program.output_shardings) for program in programs]
        assert {device for leaves in placed for leaf in leaves for device in leaf.device_set} == {chosen}
