"""What goes to the device in one array comes out as it went in, and the device sees what the host sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from predictors import LLAMA, D, N, make, requests

from prime_jax.errors import PredictorError
from prime_jax.predict import programs
from prime_jax.predict.inputs import Request, check_values
from prime_jax.predict.packing import (
    ALIGNED,
    BAD_ANSWER,
    BAD_INPUT,
    SOUND,
    Packing,
    flat,
    valid_input,
    with_state,
)
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.weights import lay_out

WAYS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("ways", WAYS)
def test_what_is_packed_is_unpacked(ways: tuple[bool, bool]) -> None:
    """Fewer rows and turns than the buffer has; one part or both rounded as JAX itself rounds."""
    context, query, mask = requests(3)
    packing = Packing(5, N + 2, D, *ways)
    buffer = packing.buffer()
    buffer[:] = 0xFF  # as an earlier request may have left it
    packing.pack(buffer, context, query, mask)
    unpacked = jax.jit(packing.unpack)(buffer)
    for part, sent, rounded in zip(unpacked, (context, query), ways, strict=False):
        expected = jnp.asarray(sent).astype(jnp.bfloat16).astype(jnp.float32) if rounded else sent
        np.testing.assert_array_equal(np.asarray(part)[tuple(map(slice, sent.shape))], expected)
    assert not np.asarray(unpacked[2])[:3, N:].any()
    np.testing.assert_array_equal(np.asarray(unpacked[2])[:3, :N], mask)


def test_rounding_on_the_host_is_rounding_on_the_device() -> None:
    """Every kind of tie, sign and size, and numbers too large for bfloat16."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    bits[:4_000] = (bits[:4_000] & 0xFFFF0000) | 0x8000  # half-way between two
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) > 1e-30)]
    values = values[: len(values) // 8 * 8].reshape(-1, 1, 8)
    packing = Packing(len(values), 1, 8, round_context=True, round_query=True)
    buffer = packing.buffer()
    packing.pack(buffer, values, values[:, 0], np.ones(values.shape[:2], bool))
    context, query, _ = jax.jit(packing.unpack)(buffer)
    expected = np.asarray(jnp.asarray(values).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(context, expected)
    np.testing.assert_array_equal(query, expected[:, 0])


@pytest.mark.parametrize(
    ("residual", "ways"), [("none", (True, True)), ("query", (True, False)), ("copy", (False, False))]
)
def test_a_program_that_rounds_its_inputs_answers_the_same_to_the_bit(
    residual: str, ways: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where half of the bytes are copied."""
    model = make(residual=residual, use_torch_compile=False)
    context, query, mask = requests(7)
    expected = Predictor.from_model(model, precision="bfloat16").predict(context, query, mask)

    def as_on_a_gpu(config: Any, shape: Any, recipe: Any) -> Packing:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(jax, "default_backend", lambda: "gpu")
            packing = packing_for(config, shape, recipe)
        assert packing[3:] == ways
        return packing

    packing_for = programs.packing_for
    monkeypatch.setattr(programs, "packing_for", as_on_a_gpu)
    rounded = Predictor.from_model(model, precision="bfloat16")
    np.testing.assert_array_equal(rounded.predict(context, query, mask), expected)


def test_buffers_can_be_read_in_place() -> None:
    for ways in WAYS:
        buffer = Packing(3, N, D, *ways).buffer()
        assert buffer.ctypes.data % ALIGNED == 0
        assert buffer.flags.c_contiguous


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
