"""What a step needs, told beforehand; what does not fit is refused with what would help."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import MODEL, batch

from prime_jax.config import Config, MeshConfig, TrainingConfig, read_config
from prime_jax.errors import ConfigError
from prime_jax.losses.objective import Objective
from prime_jax.train import memory, program
from prime_jax.train.memory import Needs
from prime_jax.train.sharding import make_mesh, split_batch, state_shardings
from prime_jax.train.state import build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step

FRUGAL = Config(
    train=TrainingConfig(
        mixed_precision=True, gradient_checkpointing=True, batch_size=64, micro_batch_size=8
    ),
    mesh=MeshConfig(fsdp=8),
)


def test_state_and_data_are_counted_by_hand() -> None:
    """Weights and two moments per device: an eighth of what is shared; nothing donated counts twice."""
    adam, mesh = optax.adam(1e-3), make_mesh(MeshConfig(fsdp=8), 16)
    config = MODEL.model_copy(update={"hidden_dim": 256})
    state = init_state(config, adam, 0)
    state = jax.device_put(state, state_shardings(mesh, state))
    placed = split_batch(batch(0), mesh)
    step = make_train_step(build_graph(config, np.float32), adam, Objective(), StepPlan(), mesh)
    needs = memory.needs_of(step.lower(state, placed).compile(), state)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards[:1])
    assert needs.state == held
    whole = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert whole / 8 < needs.state < whole / 4
    read = placed._replace(example=None)  # which only error messages need
    assert needs.data == sum(leaf.nbytes for leaf in jax.tree.leaves(read)) / 8
    assert needs.working > 0


@pytest.mark.parametrize("donated", [True, False])
def test_what_is_donated_is_not_counted_twice(donated: bool) -> None:
    """4 MB of state, 4 kB of data, and 8 kB of results; the new state needs 4 MB more only where it is not
    written over the old one."""
    state, data = jnp.zeros(10**6), jnp.zeros(1000)

    def step(state: jax.Array, data: jax.Array) -> tuple[jax.Array, jax.Array]:
        return state + 1.0, jnp.concatenate([data, 2.0 * data])

    program = jax.jit(step, donate_argnums=0 if donated else ())
    needs = memory.needs_of(program.lower(state, data).compile(), state)
    assert (needs.state, needs.data) == (4 * 10**6, 4000)
    assert 8000 <= needs.working - (0 if donated else 4 * 10**6) < 20_000


def test_a_cpu_device_has_its_share_of_what_is_free() -> None:
    share = memory.available(jax.devices("cpu")[0])
    assert share is not None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < share * jax.local_device_count() < whole


def test_one_line_in_plain_words() -> None:
    needs = Needs(state=3_300_000_000, data=100_000_000, working=1_900_000_000)
    assert memory.describe(needs, 141_000_000_000) == (
        "memory of a step on each device: 5.30 GB of 141.0 (weights and optimizer 3.30, data 0.10, "
        "activations and gradients 1.90)"
    )


def test_what_cannot_fit_is_refused_with_what_helps() -> None:
    needs = Needs(1, 1, 10**12)
    wasteful = Config(
        train=TrainingConfig(mixed_precision=False, gradient_checkpointing=False, batch_size=64)
    )
    with pytest.raises(
        ConfigError, match=r"cannot fit.*mixed-precision true; .*checkpointing true; .*size 16 "
    ):
        memory.check(needs, 10**9, wasteful)
    memory.check(needs, None, wasteful)
    memory.check(Needs(1, 1, 1), 10**9, wasteful)
    assert "mixed" not in memory.suggestions(FRUGAL)
    assert memory.suggestions(FRUGAL).endswith("first: --train.batch-size 32 (fewer negatives)")


@pytest.mark.parametrize(
    ("batch_size", "micro", "mesh"),
    [
        (8, 0, {}),
        (24, 0, {}),  # no quarter of it can be shared by eight devices
        (64, 0, {}),
        (56, 8, {"fsdp": 2}),
        (64, 32, {"data": 8}),
        (24, 24, {"data": 2, "fsdp": 2}),
        (14, 0, {"data": 1}),  # no quarter of it divides it
        (12, 4, {"data": 1}),
    ],
)
def test_what_is_suggested_is_a_valid_setting(batch_size: int, micro: int, mesh: dict[str, int]) -> None:
    """Each by itself, beside what was given, on eight devices."""
    config = Config(
        train=TrainingConfig(batch_size=batch_size, micro_batch_size=micro, mixed_precision=False),
        mesh=MeshConfig(**mesh),
    )
    make_mesh(config.mesh, batch_size, micro)
    given = [f"--train.batch-size={batch_size}", f"--train.micro-batch-size={micro}"]
    given += ["--train.mixed-precision=false", *(f"--mesh.{name}={value}" for name, value in mesh.items())]
    for suggestion in memory.suggestions(config).split(": ")[1].split("; "):
        words = " ".join(re.findall(r"--[\w.-]+ \w+", suggestion)).split()
        changed = read_config(None, given + words)
        make_mesh(changed.mesh, changed.train.batch_size, changed.train.micro_batch_size)
        assert changed != config


def test_where_no_setting_is_left_the_model_is_too_large() -> None:
    config = Config(train=TrainingConfig(batch_size=1), mesh=MeshConfig(data=1))
    assert memory.suggestions(config) == "What helps, the cheapest first: a smaller model"


def test_fewer_rows_are_no_fewer_negatives_where_the_whole_corpus_is() -> None:
    config = Config(train=TrainingConfig(batch_size=64, negatives="corpus"))
    assert memory.suggestions(config).endswith("--train.batch-size 32")


def test_a_device_that_runs_out_after_all() -> None:
    error = memory.explain_exhausted(RuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), FRUGAL)
    assert "ran out of memory (RESOURCE_EXHAUSTED: 9 GB). What helps" in str(error)


def test_a_run_that_cannot_fit_stops_before_its_first_step(
    config: Config, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prime_jax.train.loop import train

    monkeypatch.setattr(program.memory, "available", lambda device: 1000)
    with pytest.raises(ConfigError, match="cannot fit"):
        train(config, tmp_path)  # type: ignore[arg-type]
