"""What goes to the device in one array comes out as it went in, and the device sees what the host sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from predictors import LLAMA, D, N, make, requests

from prime_jax.errors import PredictorError
from prime_jax.predict import staging
from prime_jax.predict.inputs import Request, check_values
from prime_jax.predict.packing import (
    BAD_ANSWER,
    BAD_INPUT,
    SOUND,
    Packing,
    flat,
    valid_input,
    with_state,
)
from prime_jax.predict.weights import lay_out


def test_what_is_packed_is_unpacked() -> None:
    """Fewer rows and turns than the buffer has, where an earlier request has left something."""
    context, query, mask = requests(3)
    packing = Packing(5, N + 2, D)
    buffer = np.full(packing.shape, np.nan, np.float32)
    packing.pack(buffer, context, query, mask)
    unpacked = jax.jit(packing.unpack)(buffer)
    for part, sent in zip(unpacked, (context, query, mask), strict=True):
        np.testing.assert_array_equal(np.asarray(part)[tuple(map(slice, sent.shape))], sent)
    assert not np.asarray(unpacked[2])[:3, N:].any()


def test_a_large_request_is_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    context, query, mask = requests(7)
    packing = Packing(7, N, D)
    whole, parts = np.zeros(packing.shape, np.float32), np.zeros(packing.shape, np.float32)
    packing.pack(whole, context, query, mask)
    monkeypatch.setattr(staging, "IN_PARTS_FROM", 1)
    packing.pack(parts, context, query, mask)
    np.testing.assert_array_equal(parts, whole)


BAD = [
    lambda c, q: (c, np.full_like(q, np.nan)),
    lambda c, q: (c, 0 * q),
    lambda c, q: (c, 1e-9 * q),
    lambda c, q: (c, 1e-42 * q),
    lambda c, q: (c, 1e9 * q),
    lambda c, q: (c, 1e30 * q),
    lambda c, q: (1e9 * c, q),
    lambda c, q: (1e-9 * c, q),
    lambda c, q: (1e-42 * c, q),
    lambda c, q: (1e25 * c, q),
    lambda c, q: (np.where(np.arange(D) == 3, np.inf, c), q),
    lambda c, q: (np.where(np.arange(D) == 3, np.nan, c), q),
]
GOOD = [
    lambda c, q: (c, q),
    lambda c, q: (0 * c, q),
    lambda c, q: (-0.0 * c, q),
    lambda c, q: (5e3 * c, 5e3 * q),
    lambda c, q: (1e-4 * c, 1e-4 * q),
]


@pytest.mark.parametrize(
    ("change", "sound"), [*((bad, False) for bad in BAD), *((good, True) for good in GOOD)]
)
def test_the_device_and_the_host_refuse_the_same(change: Any, sound: bool) -> None:
    """Row 1 of three; turns that no mask shows hold garbage."""
    context, query, mask = requests(3)
    mask[1, 2], context[1] = True, query[0]
    changed = change(context[1, 2].copy(), query[1].copy())
    context[1, 2], query[1] = (part.astype(np.float32) for part in changed)
    seen = np.asarray(jax.jit(valid_input)(context, query, mask))
    assert seen.tolist() == [True, sound, True]
    if sound:
        check_values(Request(context, query, mask, False))
        return
    with pytest.raises(PredictorError, match=r"(query\[1\]|context\[1, 2\]) h"):
        check_values(Request(context, query, mask, False))


def test_the_state_tells_bad_input_from_a_bad_answer() -> None:
    answers = jnp.array([[0.6, 0.8], [0.0, 0.0], [jnp.nan, 0.0], [3.0, 4.0], [0.6, 0.8], [jnp.nan, 0.0]])
    states = with_state(answers, jnp.array([True, True, True, True, False, False]))
    assert states[:, 2].tolist() == [SOUND, BAD_ANSWER, BAD_ANSWER, BAD_ANSWER, BAD_INPUT, BAD_INPUT]
    np.testing.assert_array_equal(states[:, :2], answers)


@pytest.mark.parametrize("fields", [{"residual": "linear"}, {"residual": "none", **LLAMA}])
def test_weights_are_few_arguments_and_come_back_to_the_bit(fields: Any) -> None:
    weights = lay_out(make(**fields), "float32")
    packed = flat(weights)
    back = packed.restore(*packed.arguments)
    assert jax.tree.structure(back) == jax.tree.structure(weights)
    for left, right in zip(jax.tree.leaves(back), jax.tree.leaves(weights), strict=True):
        assert left.shape == right.shape
        np.testing.assert_array_equal(left, right)
    assert [array.ndim for array in packed.arguments] == [1, *[2] * (len(packed.arguments) - 1)]
