"""Joins the single requests of many callers into one device call.

A prediction for 32 requests costs little more than one for a single request, because the weights are read
once. The first request waits for others up to `max_delay_ms`; while the device is busy, the next batch
gathers, and a full one is packed and sent before the answer of the present one is waited for.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from prime_jax.errors import OverloadedError, PredictorError, WrongAnswerError
from prime_jax.predict.inputs import Request


class Stats(NamedTuple):
    """What a batcher has done so far.

    Attributes:
        requests: Requests answered, with a prediction or an error.
        calls: Device calls they took.
        waiting: Requests in the queue now.
    """

    requests: int
    calls: int
    waiting: int


class _Waiting(NamedTuple):
    context: np.ndarray  # [N, D]
    query: np.ndarray  # [D]
    mask: np.ndarray  # [N]
    arrived: float
    answer: "Future[np.ndarray]"


@runtime_checkable
class UnderWay(Protocol):
    """A device call that has been started."""

    def ready(self) -> bool:
        """Whether `result` would not wait."""

    def result(self) -> np.ndarray:
        """Wait for the answers, `[B, E]`, or raise what went wrong."""


class _Done(NamedTuple):
    """A call that was answered at once."""

    answers: np.ndarray

    def ready(self) -> bool:
        return True

    def result(self) -> np.ndarray:
        return self.answers


Start = Callable[[np.ndarray, np.ndarray, np.ndarray], UnderWay]


class Batcher:
    """Predicts for callers that come one at a time, in any number of threads or asyncio tasks.

    Closing it answers what is in the queue and refuses what comes later; as a context manager it closes
    itself.

    Args:
        predict: `(context [B, N, D], query [B, D], context_mask [B, N]) -> [B, E]`, called from one thread
            only.
        check: `(context, query, context_mask) -> Request`, called on the caller's thread, so that a bad
            request is refused before it is joined with others.
        max_batch: Most requests of one device call.
        max_delay_ms: How long a request may wait for company.
        max_queue: Most requests that wait; more are refused.
        on_call: Told the number of requests of every device call.
        start: As `predict`, but comes back before the answer is there; called from the same thread. Without
            it, one call ends before the next one starts.
    """

    def __init__(
        self,
        predict: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
        check: Callable[[ArrayLike, ArrayLike, ArrayLike | None], Request],
        *,
        max_batch: int = 32,
        max_delay_ms: float = 2.0,
        max_queue: int = 1024,
        on_call: Callable[[int], None] | None = None,
        start: Start | None = None,
    ):
        if max_batch < 1 or max_queue < 1 or not max_delay_ms >= 0:
            raise PredictorError(
                f"max_batch {max_batch} and max_queue {max_queue} must be 1 or more, max_delay_ms "
                f"{max_delay_ms} 0 or more"
            )
        self._predict, self._check, self._on_call = predict, check, on_call
        self._start = start
        self._max_batch, self._max_queue = max_batch, max_queue
        self._delay = max_delay_ms / 1000
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._requests = self._calls = 0
        self._worker = threading.Thread(target=self._work, name="prime-jax batcher", daemon=True)
        self._worker.start()

    def submit(
        self, context: ArrayLike, query: ArrayLike, context_mask: ArrayLike | None = None
    ) -> "Future[np.ndarray]":
        """Hand in one request and go on; the future gives its prediction `[E]`. Cancel it to take it back.

        Args:
            context: Turns, oldest first, `[N, D]`.
            query: `[D]`.
            context_mask: True where a turn is real, `[N]`; None means all are.

        Raises:
            PredictorError: If the request is not valid, or the batcher is closed.
            OverloadedError: If too many requests wait already.
        """
        contexts, queries, mask, single = self._check(context, query, context_mask)
        if not single:
            raise PredictorError("a batcher takes one request at a time: context [N, D] and query [D]")
        future: Future[np.ndarray] = Future()
        with self._changed:
            if self._closed:
                raise PredictorError("the batcher is closed")
            if len(self._queue) >= self._max_queue:
                self._drop_cancelled()
            if len(self._queue) >= self._max_queue:
                raise OverloadedError(f"{len(self._queue)} requests are waiting already; try again later")
            arrived = time.monotonic()
            self._queue.append(
                _Waiting(contexts[0].copy(), queries[0].copy(), mask[0].copy(), arrived, future)
            )
            self._changed.notify()
        return future

    def predict(
        self, context: ArrayLike, query: ArrayLike, context_mask: ArrayLike | None = None
    ) -> np.ndarray:
        """Predict for one request, together with those of other threads; arguments and errors as `submit`."""
        return self.submit(context, query, context_mask).result()

    async def predict_async(
        self, context: ArrayLike, query: ArrayLike, context_mask: ArrayLike | None = None
    ) -> np.ndarray:
        """Predict for one request from asyncio; cancelling the task takes the request back."""
        return await asyncio.wrap_future(self.submit(context, query, context_mask))

    def stats(self) -> Stats:
        """What has been done so far, and how much is waiting."""
        with self._changed:
            self._drop_cancelled()
            return Stats(self._requests, self._calls, len(self._queue))

    def close(self) -> None:
        """Answer what is waiting, then stop. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drop_cancelled(self) -> None:
        """Requests taken back take no place in the queue."""
        self._queue = deque(waiting for waiting in self._queue if not waiting.answer.cancelled())

    def _work(self) -> None:
        running: tuple[list[_Waiting], UnderWay] | None = None
        while True:
            batch = None
            if running is not None:
                batch = None if running[1].ready() else self._take_if_full()
                if batch is None:
                    self._finish(*running)
                    running = None
            if batch is None:
                batch = self._next()  # may wait, so nothing is left unanswered here
            live = [waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()]
            started = self._begin(live) if live else None
            if running is not None:
                self._finish(*running)
            running = None if started is None else (live, started)
            if running is None and not batch:
                return

    def _take_if_full(self) -> list[_Waiting] | None:
        """A full batch, without waiting, or None: a smaller one would keep out those that come meanwhile."""
        with self._changed:
            self._drop_cancelled()
            return self._take() if len(self._queue) >= self._max_batch else None

    def _take(self) -> list[_Waiting]:
        """The oldest requests of the queue; to be called with the lock held."""
        return [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]

    def _next(self) -> list[_Waiting]:
        """The next batch, waiting for it; empty when the batcher is closed and nothing is left."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            while 0 < len(self._queue) < self._max_batch and not self._closed:
                left = self._queue[0].arrived + self._delay - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._take()

    def _begin(self, batch: list[_Waiting]) -> UnderWay | None:
        """Start one device call; where that fails already, the requests are answered one by one."""
        try:
            return self._call(batch)
        except Exception as failed:  # whatever it is belongs to the caller, not to this thread
            self._separately(batch, failed)
            return None

    def _finish(self, batch: list[_Waiting], running: UnderWay) -> None:
        """Give every request its answer. If the call failed, each is tried alone."""
        try:
            answers = running.result()
            if len(answers) != len(batch):
                raise WrongAnswerError(f"{len(batch)} requests were answered with {len(answers)} predictions")
        except Exception as failed:
            self._separately(batch, failed)
            return
        self._count(len(batch))
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.answer.set_result(answer)

    def _separately(self, batch: list[_Waiting], failed: Exception) -> None:
        """An error stays with its request: each one of a failed call is tried alone."""
        if len(batch) == 1:
            self._count(1)
            batch[0].answer.set_exception(failed)
            return
        for waiting in batch:
            if (alone := self._begin([waiting])) is not None:
                self._finish([waiting], alone)

    def _call(self, batch: list[_Waiting]) -> UnderWay:
        """Join requests and start a device call."""
        longest = max(len(waiting.mask) for waiting in batch)
        context = np.zeros((len(batch), longest, len(batch[0].query)), np.float32)
        mask = np.zeros((len(batch), longest), bool)
        for row, waiting in enumerate(batch):
            context[row, : len(waiting.mask)] = waiting.context
            mask[row, : len(waiting.mask)] = waiting.mask
        with self._changed:
            self._calls += 1
        if self._on_call is not None:
            self._on_call(len(batch))
        query = np.stack([waiting.query for waiting in batch])
        if self._start is not None:
            return self._start(context, query, mask)
        return _Done(self._predict(context, query, mask))

    def _count(self, answered: int) -> None:
        with self._changed:
            self._requests += answered
