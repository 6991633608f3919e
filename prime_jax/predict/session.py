"""Conversations that remember: `append` a turn, `predict` for a query, and only what is new is computed.

A session holds the newest N turns of one conversation, or of a batch of them, with their keys and values on
the device in buffers that are allocated once and updated in place (FR-PRED-012, FR-PRED-014). Its predictions
are those of `Predictor.predict` on the same windows.
"""

import json
import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load, save

from prime_jax.errors import PredictorError
from prime_jax.predict.inputs import Request, check_norms, rows
from prime_jax.predict.session_programs import SessionPrograms, WindowPrograms
from prime_jax.predict.started import check_state

FORMAT = "prime-jax session 1"


class Session:
    """One conversation, or a batch of them side by side (see `Predictor.session`).

    `append` only remembers a turn. Its keys and values are computed with the next `predict`, in one pass with
    the query: a second pass over the weights would cost more than the few rows it saves. `prepare` does it
    earlier.

    Safe to share between threads; calls take turns.

    Attributes:
        batch: How many conversations there are.
    """

    def __init__(self, programs: SessionPrograms | WindowPrograms):
        config = programs.config
        batch = self.batch = programs.batch
        self._programs = programs
        self._config = config
        self._window = np.zeros((batch, config.max_context_length, config.input_dim), np.float32)
        self._lengths = np.zeros(batch, np.int32)
        self._cached = np.zeros(batch, np.int32)  # the first so many turns of each window are in the cache
        self._cache: Any = programs.empty()
        self._lock = threading.RLock()

    @property
    def lengths(self) -> np.ndarray:
        """How many turns each conversation holds, `[B]`."""
        return self._lengths.copy()

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """The turns as `Predictor.predict` takes them: context `[B, N, D]` and context_mask `[B, N]`."""
        with self._lock:
            mask = np.arange(self._window.shape[1]) < self._lengths[:, None]
            return self._window.copy(), mask

    def append(self, turn: ArrayLike, rows_to: ArrayLike | None = None) -> None:
        """Add a turn to every conversation, or to some. Where the window is full its oldest turn drops out.

        Dropping a turn moves all others by one position, so the whole window is computed anew at the next
        `predict`, which then costs as much as `Predictor.predict`.

        Args:
            turn: One embedding for each conversation, `[B, D]`, or `[D]` for a single one.
            rows_to: True for the conversations that get theirs, `[B]`; what `turn` holds for others is
                ignored.

        Raises:
            PredictorError: For a wrong shape or dtype, NaN, Inf or a norm that no embedding has. The session
                stays as it was.
        """
        turns, _ = rows("turn", turn, self.batch, self._config.input_dim)
        chosen = self._chosen(rows_to)
        check_norms("turn", turns, chosen, zero=True)
        with self._lock:
            for row in np.flatnonzero(chosen):
                if self._lengths[row] == self._window.shape[1]:
                    self._window[row, :-1] = self._window[row, 1:].copy()
                    self._lengths[row] -= 1
                    self._cached[row] = 0
                self._window[row, self._lengths[row]] = turns[row]
                self._lengths[row] += 1

    def predict(self, query: ArrayLike) -> np.ndarray:
        """Predict for one query of each conversation.

        Args:
            query: `[B, D]`, or `[D]` for a single conversation.

        Returns:
            Unit-norm float32 vectors `[B, E]`, or `[E]`.

        Raises:
            PredictorError: For a wrong shape or dtype, NaN, Inf or a norm that no embedding has. The session
                keeps its turns.
        """
        queries, single = rows("query", query, self.batch, self._config.input_dim)
        answers = self._advance(queries)
        if answers[:, -1].any():
            check_norms("query", queries)
            with self._lock:
                context, mask = self.window()
            check_state(answers[:, -1], Request(context, queries, mask, single))
        vectors = np.array(answers[:, :-1], order="C")
        return vectors[0] if single else vectors

    def prepare(self) -> None:
        """Compute the keys and values of new turns now, for instance while the user is typing."""
        with self._lock:
            if (self._cached < self._lengths).any():
                self._advance(np.zeros((self.batch, self._config.input_dim), np.float32))

    def reset(self, rows_to: ArrayLike | None = None) -> None:
        """Forget all turns, of every conversation or of those where `rows_to` `[B]` is True."""
        chosen = self._chosen(rows_to)
        with self._lock:
            self._lengths[chosen] = 0
            self._cached[chosen] = 0

    def save(self) -> bytes:
        """The turns as a small safetensors file. Keys and values are not saved: they can be computed anew."""
        with self._lock:
            tensors = {"turns": self._window, "lengths": self._lengths}
            content: bytes = save(tensors, metadata={"format": FORMAT})
            return content

    def restore(self, saved: bytes) -> None:
        """Continue from what `save` gave, in this process or another, with this model or a newer one.

        Where this model looks at fewer turns, the newest are kept.

        Raises:
            PredictorError: If the bytes are damaged or do not fit. The session stays as it was.
        """
        turns, lengths = _read(saved)
        if turns.shape[::2] != (self.batch, self._config.input_dim):
            raise PredictorError(
                f"the saved session has {turns.shape[0]} conversations of dimension {turns.shape[2]}, "
                f"this one {self.batch} of {self._config.input_dim}"
            )
        check_norms("saved turns", turns, np.arange(turns.shape[1]) < lengths[:, None], zero=True)
        with self._lock:
            self._cached[:] = 0
            for row, length in enumerate(lengths):
                kept = min(int(length), self._window.shape[1])
                self._window[row, :kept] = turns[row, length - kept : length]
                self._lengths[row] = kept

    def _advance(self, query: np.ndarray) -> np.ndarray:
        """Bring the cache up to date and answer the query: predictions with their state, `[B, E + 1]`."""
        with self._lock:
            start, count = self._cached, self._lengths - self._cached
            needed = int(count.max(initial=0))
            new = next(some for some in self._programs.turn_counts if some >= needed)
            if new == self._window.shape[1]:
                start, count = np.zeros_like(start), self._lengths
            slots = np.minimum(start[:, None] + np.arange(new), self._window.shape[1] - 1)
            turns = np.take_along_axis(self._window, slots[..., None], axis=1)
            try:
                answer, self._cache = self._programs.advance(self._cache, turns, start, count, query)
                answers = np.asarray(answer)
            except BaseException:  # the old buffers were given away; the turns are all here
                self._cached[:] = 0
                self._cache = self._programs.empty()
                raise
            self._cached[:] = self._lengths
            return answers

    def _chosen(self, rows_to: ArrayLike | None) -> np.ndarray:
        chosen = np.ones(self.batch, bool) if rows_to is None else np.asarray(rows_to)
        if chosen.dtype != bool or chosen.shape != (self.batch,):
            raise PredictorError(f"rows_to is {chosen.dtype} {chosen.shape}, expected bool ({self.batch},)")
        return chosen


def _read(saved: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Turns `[B, N, D]` and lengths `[B]` of a saved session."""
    try:
        tensors = load(saved)
        header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    except (SafetensorError, ValueError, TypeError) as damaged:
        raise PredictorError(f"this is not a saved session: {damaged}") from None
    if header.get("__metadata__", {}).get("format") != FORMAT:
        raise PredictorError(f"this is not a saved session of the format '{FORMAT}'")
    turns, lengths = tensors.get("turns"), tensors.get("lengths")
    if turns is None or lengths is None or turns.ndim != 3 or lengths.shape != turns.shape[:1]:
        raise PredictorError("the saved session lacks its turns or their number")
    if turns.dtype != np.float32 or not np.issubdtype(lengths.dtype, np.integer):
        raise PredictorError(f"the saved session holds {turns.dtype} turns and {lengths.dtype} lengths")
    if (lengths < 0).any() or (lengths > turns.shape[1]).any():
        raise PredictorError(f"the saved session says it holds {lengths.tolist()} turns of {turns.shape[1]}")
    return turns, lengths
