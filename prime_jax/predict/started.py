"""A request on its way: cut into the chunks that programs take, two of them on the device at a time."""

from collections import deque

import numpy as np

from prime_jax.errors import WrongAnswerError
from prime_jax.predict.inputs import Request, Vectors, check_values
from prime_jax.predict.packing import BAD_INPUT, SOUND
from prime_jax.predict.programs import Programs, Running

AT_ONCE = 2  # the next chunk is packed and copied while the device computes the present one


class Started:
    """Predictions under way. `result` waits for them.

    Args:
        programs: What computes.
        request: Checked for its shape.
        most: Most rows of a chunk.
    """

    def __init__(self, programs: Programs, request: Request, most: int):
        self._programs = programs
        self._request = request
        self._most = most
        self._sent = 0
        self._running: deque[Running] = deque()
        self._send()

    def ready(self) -> bool:
        """Whether `result` would wait for the device no more."""
        return self._sent >= len(self._request.mask) and all(chunk.ready() for chunk in self._running)

    def result(self, *, zero_query: bool = False) -> Vectors:
        """The predictions, `[B, E]`.

        Args:
            zero_query: Take queries of any small norm, and what comes of them.

        Raises:
            PredictorError: If the device found a row of the request not to be sound.
            WrongAnswerError: If the answer to a sound row is no unit vector.
        """
        parts = []
        while self._running:
            parts.append(self._running.popleft().result())
            self._send()
        if not parts:
            return np.zeros((0, self._programs.width), np.float32)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if zero_query:
            check_values(self._request, least=0.0)
        else:
            check_state(rows[:, -1], self._request)
        return np.array(rows[:, :-1], order="C")

    def _send(self) -> None:
        """Fill the device's queue with the next chunks."""
        context, query, mask, _ = self._request
        while len(self._running) < AT_ONCE and self._sent < len(mask):
            chunk = slice(self._sent, self._sent + self._most)
            self._sent = chunk.stop
            rows, turns = mask[chunk].shape
            program = self._programs.serving(rows, turns)
            self._running.append(program.start(context[chunk], query[chunk], mask[chunk]))


def check_state(state: np.ndarray, request: Request) -> None:
    """Refuse what the program found not to be sound, in the words of the checks on the host.

    Args:
        state: Last column of the answers, `[B]`.
        request: What was asked.

    Raises:
        PredictorError: Naming the vector.
        WrongAnswerError: Naming the row whose answer is no unit vector.
    """
    if not state.any():  # all are SOUND; NaN counts as true
        return
    if (state == BAD_INPUT).any():
        check_values(request)
    row = int(np.flatnonzero(state != SOUND)[0])
    raise WrongAnswerError(
        f"the answer to request {row} is no unit vector: query and turns are too large or too small for this "
        "model, or cancel each other out"
    )
