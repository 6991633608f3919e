"""Many callers share device calls; each gets its own answer, or its own error."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from predictors import D, N, make, requests

from prime_jax.errors import OverloadedError, PredictorError
from prime_jax.predict.batcher import Batcher
from prime_jax.predict.predictor import Predictor


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.from_model(make(use_torch_compile=False))


class Device:
    """A predictor whose calls wait until they are let go, so that tests decide what meets what."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.started = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def predict(self, context: np.ndarray, query: np.ndarray, mask: np.ndarray) -> np.ndarray:
        self.sizes.append(len(query))
        self.started.release()
        assert self.go.acquire(timeout=30)
        if (query == 13).any():
            raise RuntimeError("unlucky")
        return query + mask.sum(axis=1, keepdims=True)

    def let_go(self, calls: int = 1) -> None:
        for _ in range(calls):
            self.go.release()


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.let_go(100)


def batcher(device: Device, **options: Any) -> Batcher:
    from prime_jax.predict.inputs import Request

    def check(context: Any, query: Any, mask: Any) -> Request:
        context, query = np.asarray(context, np.float32), np.asarray(query, np.float32)
        mask = np.ones(len(context), bool) if mask is None else np.asarray(mask)
        return Request(context[None], query[None], mask[None], True)

    return Batcher(device.predict, check, **{"max_delay_ms": 0.0} | options)


def ask(batch: Batcher, value: float, turns: int = 0) -> Any:
    return batch.submit(np.zeros((turns, 2)), np.full(2, value))


def test_answers_are_those_of_single_requests(predictor: Predictor) -> None:
    context, query, mask = requests(40)
    context = np.where(mask[..., None], context, 0.0)
    expected = [predictor.predict(context[row], query[row], mask[row]) for row in range(40)]
    with predictor.batcher(max_delay_ms=20.0, max_batch=16) as batch, ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda row: batch.predict(context[row], query[row], mask[row]), range(40)))
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    assert batch.stats().requests == 40
    assert batch.stats().calls < 40


def test_requests_of_any_length_meet(predictor: Predictor) -> None:
    context, query, _ = requests(N + 1)
    context = np.nan_to_num(context)
    with predictor.batcher(max_delay_ms=50.0) as batch:
        futures = [batch.submit(context[row, :row], query[row]) for row in range(N + 1)]
        for row, future in enumerate(futures):
            np.testing.assert_allclose(
                future.result(30), predictor.predict(context[row, :row], query[row]), atol=1e-5
            )


def test_from_asyncio(predictor: Predictor) -> None:
    context, query, mask = requests(20)
    context = np.nan_to_num(context)

    async def all_at_once(batch: Batcher) -> list[np.ndarray]:
        return await asyncio.gather(
            *(batch.predict_async(context[row], query[row], mask[row]) for row in range(20))
        )

    with predictor.batcher() as batch:
        answers = asyncio.run(all_at_once(batch))
    np.testing.assert_allclose(answers, predictor.predict(context, query, mask), atol=1e-5)


def test_what_arrives_while_the_device_is_busy_goes_together(device: Device) -> None:
    seen: list[int] = []
    with batcher(device, max_batch=3, on_call=seen.append) as batch:
        first = ask(batch, 1)
        assert device.started.acquire(timeout=30)
        later = [ask(batch, value, turns=value) for value in range(2, 7)]
        assert batch.stats() == (0, 1, 5)
        device.let_go(3)
        assert first.result(30).tolist() == [1, 1]
        assert [future.result(30)[0] for future in later] == [4, 6, 8, 10, 12]
    assert device.sizes == seen == [1, 3, 2]
    assert batch.stats() == (6, 3, 0)


def test_a_full_batch_does_not_wait(device: Device) -> None:
    """The delay would be an hour."""
    device.let_go(10)
    with batcher(device, max_batch=2, max_delay_ms=3_600_000.0) as batch:
        futures = [ask(batch, value) for value in range(4)]
        assert [future.result(30)[0] for future in futures] == [0, 1, 2, 3]
        assert device.sizes == [2, 2]
        waits = ask(batch, 5)
        assert not waits.done()
    assert waits.result(30)[0] == 5  # closing answers what is waiting


def test_errors_stay_with_their_request(device: Device) -> None:
    device.let_go(1)
    with batcher(device) as batch:
        ask(batch, 0).result(30)
        assert device.started.acquire(timeout=30)
        blocked = ask(batch, 1)
        assert device.started.acquire(timeout=30)
        futures = [ask(batch, value) for value in (2, 13, 4)]
        device.let_go(10)
        assert blocked.result(30)[0] == 1
        assert futures[0].result(30)[0] == 2
        with pytest.raises(RuntimeError, match="unlucky"):
            futures[1].result(30)
        assert futures[2].result(30)[0] == 4
        assert ask(batch, 6).result(30)[0] == 6  # and it goes on
    assert device.sizes == [1, 1, 3, 1, 1, 1, 1]


def test_too_few_answers_fail_their_requests_and_nothing_else() -> None:
    short = Device()
    short.let_go(10)
    predict = short.predict
    short.predict = lambda *arrays: predict(*arrays)[:-1]  # type: ignore[method-assign]
    with batcher(short) as batch:
        with pytest.raises(PredictorError, match="1 requests were answered with 0 predictions"):
            ask(batch, 1).result(30)
        with pytest.raises(PredictorError, match="1 requests were answered with 0 predictions"):
            ask(batch, 2).result(30)


def test_what_the_caller_changes_afterwards_does_not_matter(device: Device) -> None:
    with batcher(device) as batch:
        ask(batch, 0)
        assert device.started.acquire(timeout=30)
        context, query, mask = np.zeros((2, 2), np.float32), np.ones(2, np.float32), np.ones(2, bool)
        later = batch.submit(context, query, mask)
        mask[:] = False
        device.let_go(10)
        assert later.result(30)[0] == 3


def test_bad_input_is_refused_on_the_callers_thread(predictor: Predictor) -> None:
    with predictor.batcher() as batch:
        with pytest.raises(PredictorError, match=r"query\[0\] holds NaN"):
            batch.submit(np.zeros((1, D)), np.full(D, np.nan))
        with pytest.raises(PredictorError, match="5 turns, the model takes at most 4"):
            batch.predict(np.zeros((N + 1, D)), np.zeros(D))
        with pytest.raises(PredictorError, match="one request at a time"):
            batch.submit(np.zeros((2, 1, D)), np.ones((2, D)))
        assert batch.stats() == (0, 0, 0)


def test_a_full_queue_refuses(device: Device) -> None:
    with batcher(device, max_queue=2) as batch:
        running = ask(batch, 0)
        assert device.started.acquire(timeout=30)
        waiting = [ask(batch, 1), ask(batch, 2)]
        with pytest.raises(OverloadedError, match="2 requests are waiting already; try again later"):
            ask(batch, 3)
        assert waiting.pop().cancel()
        waiting.append(ask(batch, 2))  # the place of one that was taken back is free
        device.let_go(10)
        assert [future.result(30)[0] for future in (running, *waiting)] == [0, 1, 2]
        assert ask(batch, 4).result(30)[0] == 4


def test_a_cancelled_request_is_not_computed(device: Device) -> None:
    with batcher(device) as batch:
        running = ask(batch, 0)
        assert device.started.acquire(timeout=30)
        kept, dropped = ask(batch, 1), ask(batch, 2)
        assert dropped.cancel()
        device.let_go(10)
        assert [running.result(30)[0], kept.result(30)[0]] == [0, 1]
        with pytest.raises(CancelledError):
            dropped.result(30)
    assert device.sizes == [1, 1]


def test_a_cancelled_task_takes_its_request_back(device: Device) -> None:
    async def gives_up(batch: Batcher) -> None:
        running = ask(batch, 0)
        assert await asyncio.to_thread(device.started.acquire, timeout=30)
        task = asyncio.create_task(batch.predict_async(np.zeros((0, 2)), np.ones(2)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        device.let_go(10)
        assert (await asyncio.wrap_future(running))[0] == 0

    with batcher(device) as batch:
        asyncio.run(gives_up(batch))
    assert device.sizes == [1]


def test_close_answers_what_waits_and_refuses_what_comes(device: Device) -> None:
    batch = batcher(device, max_batch=2)
    futures = [ask(batch, value) for value in range(5)]
    closing = threading.Thread(target=batch.close)
    closing.start()
    device.let_go(10)
    closing.join(30)
    assert [future.result(0)[0] for future in futures] == [0, 1, 2, 3, 4]
    with pytest.raises(PredictorError, match="the batcher is closed"):
        ask(batch, 6)
    batch.close()


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_queue": 0}, {"max_delay_ms": -1.0}])
def test_limits_must_make_sense(predictor: Predictor, options: dict[str, Any]) -> None:
    with pytest.raises(PredictorError, match="must be 1 or more, max_delay_ms"):
        predictor.batcher(**options)


class Queue:
    """A device as JAX shows it: calls are started at once, and end when they are let go."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.copied = threading.Event()  # starting takes until this is set
        self.copied.set()

    def start(self, context: np.ndarray, query: np.ndarray, mask: np.ndarray) -> "Call":
        self.started.append(len(query))
        self.begun.release()
        assert self.copied.wait(timeout=30)
        return Call(self, query)


class Call:
    """One of its calls, under way."""

    def __init__(self, queue: Queue, query: np.ndarray) -> None:
        self.queue, self.query = queue, query

    def ready(self) -> bool:
        return False

    def result(self) -> np.ndarray:
        assert self.queue.go.acquire(timeout=30)
        if (self.query == 13).any():
            raise RuntimeError("unlucky")
        return 2 * self.query


def overlapping(queue: Queue, **options: Any) -> Batcher:
    def never(*_: np.ndarray) -> np.ndarray:
        raise AssertionError("there is a way to start without waiting")

    made = batcher(Device(), **options)
    made.close()
    return Batcher(never, made._check, max_delay_ms=0.0, start=queue.start, **options)


def test_a_full_batch_is_sent_before_the_answer_of_the_present_one() -> None:
    """No answer is let go until two batches are on the device; the third has to wait for the first."""
    queue = Queue()
    queue.copied.clear()
    with overlapping(queue, max_batch=2) as batch:
        futures = [ask(batch, 1)]
        assert queue.begun.acquire(timeout=30)
        futures += [ask(batch, value) for value in range(2, 7)]
        queue.copied.set()
        assert queue.begun.acquire(timeout=30)
        assert queue.started == [1, 2]
        assert not queue.begun.acquire(timeout=0.05)
        assert not any(future.done() for future in futures)
        queue.go.release()
        assert futures[0].result(30)[0] == 2
        assert queue.begun.acquire(timeout=30)
        assert not any(future.done() for future in futures[1:])
        queue.go.release(10)
        assert [future.result(30)[0] for future in futures] == [2, 4, 6, 8, 10, 12]
    assert queue.started == [1, 2, 2, 1]


def test_what_does_not_fill_a_batch_waits_for_the_present_one() -> None:
    """Sent at once it would keep out those that come while the device is busy."""
    queue = Queue()
    queue.copied.clear()
    with overlapping(queue, max_batch=3) as batch:
        futures = [ask(batch, 1)]
        assert queue.begun.acquire(timeout=30)
        futures += [ask(batch, 2), ask(batch, 3)]
        queue.copied.set()
        assert not queue.begun.acquire(timeout=0.05)
        futures.append(ask(batch, 4))
        queue.go.release(10)
        assert [future.result(30)[0] for future in futures] == [2, 4, 6, 8]
    assert queue.started == [1, 3]


def test_an_error_of_one_call_does_not_touch_the_next() -> None:
    queue = Queue()
    with overlapping(queue, max_batch=2) as batch:
        futures = [ask(batch, value) for value in (1, 13, 3, 4, 5, 6)]
        queue.go.release(20)
        for value, future in zip((1, 13, 3, 4, 5, 6), futures, strict=True):
            if value == 13:
                with pytest.raises(RuntimeError, match="unlucky"):
                    future.result(30)
            else:
                assert future.result(30)[0] == 2 * value
    assert batch.stats().requests == 6


def test_requests_cancelled_while_the_device_is_busy_do_not_hold_back_its_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch that is full when the worker looks, and gone when it goes to wait for one."""
    queue = Queue()
    queue.copied.clear()
    with overlapping(queue, max_batch=2) as batch:
        futures = [ask(batch, 1)]
        assert queue.begun.acquire(timeout=30)
        futures += [ask(batch, 2), ask(batch, 3)]
        wait_for_next = batch._next

        def gone() -> Any:
            for future in futures[1:]:
                future.cancel()
            batch.stats()  # cancelled requests leave the queue
            return wait_for_next()

        monkeypatch.setattr(batch, "_next", gone)
        queue.copied.set()
        queue.go.release(10)
        assert futures[0].result(10)[0] == 2
