"""What watching takes: memory by arithmetic, dispatches by counting, programs by their caches, and layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_wrap import CONFIG, GUARDED, Run, loss

from prime_jax.hybrid.phases import Phase
from prime_jax.hybrid.programs import programs
from prime_jax.hybrid.settings import HybridConfig
from prime_jax.hybrid.state import init_hybrid


def size(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("averages", "half", "per_weight"),
    [((12, 25, 50, 100), True, 16), ((25, 100), True, 12), ((25, 100), False, 20)],
)
def test_memory_is_so_many_bytes_per_weight_and_little_else(
    averages: tuple[int, ...], half: bool, per_weight: int
) -> None:
    """INV-6: of a model of 206M weights in 200 leaves, without making it."""
    config = HybridConfig(ema_steps=averages, half_precision=half)
    weights = {str(at): jax.ShapeDtypeStruct((1030, 1000), jnp.float32) for at in range(200)}
    state = jax.eval_shape(lambda params: init_hybrid(params, config), weights)
    assert size((state.anchor, state.basis)) == 206_000_000 * per_weight
    assert size(state) - size((state.anchor, state.basis)) < 8_000_000


def test_a_step_without_an_observation_runs_nothing_and_an_observation_one_program() -> None:
    run = Run(CONFIG)
    ran: list[str] = []

    def counted(name: str) -> object:
        program = getattr(run.trainer._run, name)
        return lambda *args, **kwargs: (ran.append(name), program(*args, **kwargs))[1]

    run.trainer._run = run.trainer._run._replace(**{name: counted(name) for name in run.trainer._run._fields})
    run.go(4)
    assert ran == []
    run.go(36)
    assert ran == ["observe"] * 8
    assert run.trainer.calls["observe"] == 8


def test_nothing_is_compiled_twice_in_a_run_that_jumps_and_resumes() -> None:
    def jumped(run: Run) -> list[int]:
        run.trainer.force_phase(Phase.PREDICT)
        known = run.go(10).trainer._run
        assert len(run.trainer.outcomes) == 1
        return [known.observe._cache_size(), known.jump._cache_size(), known.move._cache_size()]

    run = Run(CONFIG).go(60)
    before = jumped(run)
    again = Run(CONFIG)
    again.trainer.restore(run.trainer.saved())
    again.state, again.at = run.state, run.at
    assert jumped(again) == before


def test_settings_of_the_host_share_their_programs() -> None:
    assert programs(CONFIG, loss) is programs(GUARDED, loss)
    assert programs(CONFIG, loss) is not programs(HybridConfig(), loss)


def test_the_state_lies_as_the_weights_do() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    values = {"a": np.arange(64, dtype=np.float32).reshape(16, 4), "b": np.ones(3, np.float32)}
    params = jax.device_put(values, {"a": rows, "b": everywhere})
    known = programs(CONFIG, loss)
    state = known.init(params)
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    state = known.settle(state, moved, None, 5, key=jax.random.key(0))
    stacks = NamedSharding(mesh, PartitionSpec(None, "data"))
    assert state.basis["a"].sharding.is_equivalent_to(stacks, 3)
    assert state.anchor["a"].sharding.is_equivalent_to(rows, 2)
    assert state.losses.sharding.is_equivalent_to(everywhere, 1)
    np.testing.assert_array_equal(state.anchor["a"], values["a"] + 1)
    np.testing.assert_array_equal(state.basis["a"][-1], np.ones((16, 4)))
    short = 1 - (1 - 1 / CONFIG.ema_steps[0]) ** 5  # an average that lags behind a move of 1
    np.testing.assert_allclose(jnp.mean(state.basis["a"][0].astype(jnp.float32)), short - 1, rtol=1e-2)
