"""A session always answers as `predict` does on the same window."""

import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from predictors import D, N, make
from safetensors.numpy import save

from prime_jax.errors import PredictorError
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.session import FORMAT, Session

MODES = ("full", "prefix", "causal")
BATCH = 3
PREDICTORS: dict[str, Predictor] = {}


def predictor(mode: str) -> Predictor:
    """One predictor for each mode, with everything compiled once."""
    if mode not in PREDICTORS:
        model = make(context_attention=mode, residual="linear", use_torch_compile=False, max_batch_size=4)
        PREDICTORS[mode] = Predictor.from_model(model)
    return PREDICTORS[mode]


def vector(seed: int, rows: int | None = None) -> np.ndarray:
    shape = (D,) if rows is None else (rows, D)
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def as_arrays(turns: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The newest N turns of each conversation, padded with garbage."""
    context = np.full((len(turns), N, D), np.nan, np.float32)
    mask = np.zeros((len(turns), N), bool)
    for row, held in enumerate(turns):
        for slot, turn in enumerate(held[-N:]):
            context[row, slot], mask[row, slot] = turn, True
    return context, mask


class Conversations(RuleBasedStateMachine):
    """Any sequence of turns, queries, resets and restarts, on several conversations of different lengths."""

    mode: str

    @initialize()
    def start(self) -> None:
        self.session = predictor(self.mode).session(BATCH)
        self.turns: list[list[np.ndarray]] = [[] for _ in range(BATCH)]

    @rule(seed=st.integers(0, 10_000), chosen=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
    def append_to_some(self, seed: int, chosen: list[bool]) -> None:
        turns = vector(seed, BATCH)
        given = np.where(np.array(chosen)[:, None], turns, np.nan)
        self.session.append(given, np.array(chosen))
        for row in np.flatnonzero(chosen):
            self.turns[row].append(turns[row])

    @rule(seed=st.integers(0, 10_000), times=st.integers(1, N + 1))
    def append_to_all(self, seed: int, times: int) -> None:
        for time in range(times):
            turns = vector(seed + time, BATCH)
            self.session.append(turns)
            for row in range(BATCH):
                self.turns[row].append(turns[row])

    @rule(seed=st.integers(0, 10_000))
    def predict(self, seed: int) -> None:
        query = vector(seed, BATCH)
        context, mask = as_arrays(self.turns)
        expected = predictor(self.mode).predict(context, query, mask)
        np.testing.assert_allclose(self.session.predict(query), expected, atol=1e-5)

    @rule()
    def prepare(self) -> None:
        self.session.prepare()

    @rule(chosen=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
    def reset(self, chosen: list[bool]) -> None:
        self.session.reset(np.array(chosen))
        for row in np.flatnonzero(chosen):
            self.turns[row] = []

    @rule()
    def move_to_another_process(self) -> None:
        saved = self.session.save()
        self.session = predictor(self.mode).session(BATCH)
        self.session.restore(saved)

    @invariant()
    def the_window_is_the_newest_turns(self) -> None:
        if hasattr(self, "session"):
            context, mask = self.session.window()
            expected, expected_mask = as_arrays(self.turns)
            np.testing.assert_array_equal(mask, expected_mask)
            np.testing.assert_array_equal(context[mask], expected[mask])
            np.testing.assert_array_equal(self.session.lengths, mask.sum(axis=1))


@pytest.mark.parametrize("mode", MODES)
def test_any_sequence_of_calls_gives_what_predict_gives(mode: str) -> None:
    machine = type(f"{mode.title()}Conversations", (Conversations,), {"mode": mode})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
    )


@pytest.mark.parametrize("residual", ["none", "query"])
@pytest.mark.parametrize("mode", MODES)
def test_the_other_residuals(mode: str, residual: str) -> None:
    fresh = Predictor.from_model(
        make(context_attention=mode, residual=residual, use_torch_compile=False, num_layers=1)
    )
    session, turns = fresh.session(), [vector(seed) for seed in range(3)]
    for turn in turns:
        session.append(turn)
        context, mask = as_arrays([turns[: session.lengths[0]]])
        query = vector(int(session.lengths[0]) + 50)
        np.testing.assert_allclose(
            session.predict(query), fresh.predict(context[0], query, mask[0]), atol=1e-5
        )


def test_shapes_with_and_without_a_batch_axis() -> None:
    session = predictor("causal").session()
    session.append(vector(1))
    session.append(vector(2)[None])
    one, many = session.predict(vector(3)), session.predict(vector(3)[None])
    assert one.shape == (D,)
    np.testing.assert_array_equal(many, one[None])


def test_the_buffers_are_updated_in_place() -> None:
    """FR-PRED-014: no memory is allocated for keys and values after the start."""
    session = predictor("causal").session(2)

    def where() -> list[int]:
        return [array.unsafe_buffer_pointer() for array in (*session._cache.keys, *session._cache.values)]

    session.append(vector(0, 2))
    session.predict(vector(1, 2))
    before = where()
    for seed in range(N + 3):
        session.append(vector(seed, 2))
        session.predict(vector(seed, 2))
    assert where() == before


def test_only_what_is_new_is_computed() -> None:
    """Turns that are in the cache are not looked at again: wiping their embeddings changes nothing."""
    model = make(context_attention="causal", residual="none", use_torch_compile=False)
    session = Predictor.from_model(model).session()
    for seed in range(2):
        session.append(vector(seed))
    expected = session.predict(vector(9))
    session._window[:] = 0
    np.testing.assert_array_equal(session.predict(vector(9)), expected)


def test_sessions_of_one_size_share_their_programs() -> None:
    served = predictor("causal")
    assert served.session(2)._programs is served.session(2)._programs
    assert served.session(2)._programs is not served.session(3)._programs


def test_a_failed_call_loses_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    session = predictor("causal").session()
    session.append(vector(1))
    session.predict(vector(0))
    session.append(vector(2))

    def fails(cache: Any, *_: Any) -> Any:
        for array in cache.keys:
            array.delete()  # as when donated to a call that failed half-way
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(type(session._programs), "advance", lambda self, cache, *rest: fails(cache))
        with pytest.raises(RuntimeError, match="out of memory"):
            session.predict(vector(3))
    context, mask = as_arrays([[vector(1), vector(2)]])
    np.testing.assert_allclose(
        session.predict(vector(3)), predictor("causal").predict(context[0], vector(3), mask[0]), atol=1e-5
    )


def test_a_saved_session_goes_on_in_a_model_with_a_shorter_window() -> None:
    session = predictor("full").session()
    for seed in range(N):
        session.append(vector(seed))
    short = Predictor.from_model(make(max_context_length=2, use_torch_compile=False))
    other = short.session()
    other.restore(session.save())
    context = np.stack([vector(N - 2), vector(N - 1)])
    assert other.lengths.tolist() == [2]
    np.testing.assert_allclose(other.predict(vector(9)), short.predict(context, vector(9)), atol=1e-5)


def test_threads_take_turns() -> None:
    session = predictor("causal").session()
    session.append(vector(1))
    expected = [session.predict(vector(seed)) for seed in range(8)]
    answers: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: answers.update({seed: session.predict(vector(seed))}))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        np.testing.assert_array_equal(answers[seed], expected[seed])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.append(np.zeros(D + 1, np.float32)), r"turn has shape \(25,\), expected \(2, 24\)"),
        (lambda s: s.append(np.zeros((2, D), int)), "turn has dtype int64, expected floating-point"),
        (lambda s: s.append(np.full((2, D), np.nan)), r"turn\[0\] holds NaN or Inf"),
        (
            lambda s: s.append(np.zeros((2, D)), np.array([1, 0])),
            r"rows_to is int64 \(2,\), expected bool \(2,\)",
        ),
        (
            lambda s: s.append(np.zeros((2, D)), np.array([True])),
            r"rows_to is bool \(1,\), expected bool \(2,\)",
        ),
        (lambda s: s.reset([True]), r"rows_to is bool \(1,\)"),
        (lambda s: s.predict(np.zeros((3, D))), r"query has shape \(3, 24\), expected \(2, 24\)"),
        (lambda s: s.predict(np.array([[0.0] * D, [np.inf] * D])), r"query\[1\] holds NaN or Inf"),
        (lambda s: s.predict(np.array([[1.0] * D, [0.0] * D])), r"query\[1\] has norm 0"),
        (lambda s: s.predict(np.full((2, D), 1e20)), r"query\[0\] has norm .*e\+20"),
        (lambda s: s.append(np.full((2, D), 1e20)), r"turn\[0\] has norm .*e\+20"),
        (lambda s: s.restore(b""), "this is not a saved session"),
        (lambda s: s.restore(s.save()[:-1]), "this is not a saved session"),
        (lambda s: s.restore(save({"turns": np.zeros((2, N, D), np.float32)})), f"of the format '{FORMAT}'"),
        (lambda s: s.restore(_saved(turns=np.zeros((2, N, D)))), "holds float64 turns"),
        (lambda s: s.restore(_saved(lengths=np.zeros(3, np.int32))), "lacks its turns or their number"),
        (lambda s: s.restore(_saved(lengths=np.full(2, N + 1))), "says it holds"),
        (
            lambda s: s.restore(_saved(turns=np.full((2, N, D), np.nan, np.float32))),
            r"saved turns\[0, 0\] holds NaN",
        ),
        (
            lambda s: s.restore(_saved(turns=np.zeros((2, N, 7), np.float32))),
            "the saved session has 2 conversations of dimension 7, this one 2 of 24",
        ),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call: Any, message: str) -> None:
    session: Session = predictor("causal").session(2)
    session.append(vector(1, 2))
    expected = session.predict(vector(2, 2))
    with pytest.raises(PredictorError, match=message):
        call(session)
    assert session.lengths.tolist() == [1, 1]
    np.testing.assert_array_equal(session.predict(vector(2, 2)), expected)


def _saved(**replaced: np.ndarray) -> bytes:
    tensors = {"turns": np.zeros((2, N, D), np.float32), "lengths": np.full(2, 2, np.int32)} | replaced
    content: bytes = save(tensors, metadata={"format": FORMAT})
    return content


def test_a_session_of_no_conversations_is_refused() -> None:
    with pytest.raises(PredictorError, match="a session of 0 conversations is none"):
        predictor("causal").session(0)


def test_in_bfloat16_a_session_stays_near_predict() -> None:
    half = Predictor.from_model(
        make(context_attention="causal", use_torch_compile=False), precision="bfloat16"
    )
    session, turns = half.session(), [vector(seed) for seed in range(3)]
    for turn in turns:
        session.append(turn)
        answer = session.predict(vector(9))
    context = np.stack(turns)
    assert float(answer @ half.predict(context, vector(9))) > 0.999
    exact = half.model(jnp.asarray(context[None]), jnp.asarray(vector(9)[None]))[0]
    assert float(answer @ np.asarray(exact)) > 0.999
