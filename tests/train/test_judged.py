"""The loss that weights are judged by is the one that is trained, without its chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import MODEL, batch, passages, run

from prime_jax.config import MeshConfig
from prime_jax.losses.corpus import in_chunks
from prime_jax.losses.objective import Objective
from prime_jax.train.judged import Given, make_judged_loss
from prime_jax.train.sharding import make_mesh, split_batch
from prime_jax.train.state import build_graph


@pytest.mark.parametrize("corpus", [False, True])
def test_is_the_loss_of_the_step_in_turns_too(corpus: bool) -> None:
    """Dropout is 0 here; a micro-batch, also one above the rows, changes neither loss nor gradient."""
    objective = Objective(schedule="learned")
    state, _ = run(0, objective=objective, num_layers=1)
    trained = run(1, objective=objective, corpus=corpus, num_layers=1)[1][0]["loss"]
    devices = make_mesh(MeshConfig(data=1), 16, 4)
    given = Given(split_batch(batch(0), devices), in_chunks(passages(), 3, devices) if corpus else None)
    graph = build_graph(MODEL.model_copy(update={"num_layers": 1}), jnp.float32)
    found = []
    for turns in ({}, {"remat": "blocks", "micro_batch": 4}, {"micro_batch": 32}):
        loss = make_judged_loss(graph, objective, devices, **turns)
        found.append(jax.jit(jax.value_and_grad(loss))(state.params, given))
    assert float(found[0][0]) == pytest.approx(trained, rel=1e-6)
    for other in found[1:]:
        for left, right in zip(*map(jax.tree.leaves, (found[0], other)), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_dropout_and_the_present_do_not_count() -> None:
    """An annealed temperature is that of the end, whatever the step."""
    state, _ = run(0, dropout=0.5, num_layers=1)
    devices = make_mesh(MeshConfig(data=1), 16)
    given = Given(split_batch(batch(0), devices), None)
    graph = build_graph(MODEL.model_copy(update={"dropout": 0.5, "num_layers": 1}), jnp.float32)
    annealed = Objective(schedule="annealed", temperature=0.5, temperature_end=0.1)
    moving = make_judged_loss(graph, annealed, devices)
    fixed = make_judged_loss(graph, Objective(temperature=0.1), devices)
    assert float(moving(state.params, given)) == pytest.approx(float(fixed(state.params, given)), rel=1e-6)
