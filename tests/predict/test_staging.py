"""Requests and answers travel through memory that the device reads and writes itself."""

import gc
import os
import signal
import weakref

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from predictors import make, requests

from prime_jax.predict import staging
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.staging import ALIGNED, Staging, has_page_locked


@pytest.fixture
def page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; a CPU has such memory too, though nothing comes of it."""
    monkeypatch.setattr(staging, "has_page_locked", lambda device: True)


def test_on_a_cpu_a_buffer_is_read_in_place() -> None:
    assert not has_page_locked(jax.devices()[0])
    buffer = Staging(jax.devices()[0]).buffer((3, 7))
    assert buffer.view is buffer.argument
    assert buffer.view.ctypes.data % ALIGNED == 0
    assert buffer.view.flags.c_contiguous


def test_what_is_written_into_a_page_locked_buffer_is_what_the_program_reads() -> None:
    there = Staging(jax.devices()[0], page_locked=True)
    buffer = there.buffer((3, 7))
    assert not np.asarray(buffer.argument).any()
    double = jax.jit(lambda x: 2 * there.fetched(x), out_shardings=there.answers)
    double = double.lower(there.shape((3, 7))).compile()
    for value in (1.0, 5.0):
        buffer.view[:] = value
        answer = double(buffer.argument)
        assert answer.sharding.memory_kind == "pinned_host"
        assert (np.asarray(answer) == 2 * value).all()


def test_the_memory_lives_as_long_as_anybody_can_write_into_it() -> None:
    view, argument = Staging(jax.devices()[0], page_locked=True).buffer((3, 7))
    alive = weakref.ref(argument)
    del argument
    gc.collect()
    assert alive() is not None
    view[:] = 1.0


def test_a_forked_process_writes_large_requests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the threads that copy; a hang would end it by the alarm."""
    monkeypatch.setattr(staging, "IN_PARTS_FROM", 1)
    filled = np.zeros(8)

    def write(part: slice) -> None:
        filled[part] = 1.0

    staging.in_parts(write, 8, 64)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        filled[:] = 0.0
        staging.in_parts(write, 8, 64)
        os._exit(int(not filled.all()))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("page_locked")
@pytest.mark.parametrize("spread", [False, True])
def test_weights_may_lie_on_another_device_or_on_several(spread: bool) -> None:
    """One predictor for each GPU, or what was trained on a mesh."""
    first, second = jax.devices()[:2]
    where = (
        NamedSharding(Mesh(np.array([first, second]), "all"), PartitionSpec())
        if spread
        else SingleDeviceSharding(second)
    )
    model = make(context_attention="causal")
    request = requests(3)
    expected = Predictor.from_model(model, batch_sizes=(4,)).predict(*request)
    nnx.update(model, jax.device_put(nnx.state(model), where))
    moved = Predictor.from_model(model, batch_sizes=(4,))
    np.testing.assert_allclose(moved.predict(*request), expected, atol=1e-6)
    assert moved.session().predict(request[1][0]).shape == expected[0].shape


@pytest.mark.usefixtures("page_locked")
@pytest.mark.parametrize("mode", ["full", "causal"])
def test_predictions_and_sessions_are_the_same_to_the_bit(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests in a row, of several sizes, so that buffers are used again."""
    model = make(context_attention=mode, use_torch_compile=False)
    context, query, mask = requests(3)
    turns = np.where(mask[..., None], context, query[:, None])
    locked = Predictor.from_model(model, batch_sizes=(1, 4))
    session = locked.session(3)
    with monkeypatch.context() as plain:
        plain.setattr(staging, "has_page_locked", lambda device: False)
        other = Predictor.from_model(model, batch_sizes=(1, 4))
        other_session = other.session(3)
        other.warmup()
    for rows in (3, 1, 3, 2):
        request = context[:rows], query[:rows], mask[:rows]
        np.testing.assert_array_equal(locked.predict(*request), other.predict(*request))
    for turn in range(turns.shape[1]):
        session.append(turns[:, turn])
        other_session.append(turns[:, turn])
        np.testing.assert_array_equal(session.predict(query), other_session.predict(query))
