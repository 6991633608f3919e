"""One device and many give the same loss, gradients and state, however the mesh is cut."""

import numpy as np
import pytest
from steps import assert_same, run, shared, with_everything

from prime_jax.config import MeshConfig
from prime_jax.losses.objective import Objective
from prime_jax.train.step import StepPlan

MESHES = [
    MeshConfig(data=2),
    MeshConfig(data=4),
    MeshConfig(data=8),
    MeshConfig(data=4, fsdp=2),
    MeshConfig(fsdp=8),
]


@pytest.mark.parametrize(
    ("mesh", "dropout"),
    [*((mesh, 0.3) for mesh in MESHES), (MeshConfig(data=8), 0.0), (MeshConfig(fsdp=8), 0.0)],
    ids=str,
)
def test_any_mesh_equals_one_device(mesh: MeshConfig, dropout: float) -> None:
    """In-batch negatives are global, and dropout follows the row, not the device."""
    assert_same(run(mesh=mesh, dropout=dropout), shared(dropout=dropout))


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4)], ids=str)
def test_all_at_once_on_any_mesh(mesh: MeshConfig) -> None:
    """Cached gradients, recomputed activations, given negatives, every kind of thing that is trained."""
    objective = Objective(schedule="learned", projection_dim=4, target="ema")
    plan = StepPlan(10, "blocks", 8)
    settings = {"objective": objective, "plan": plan, "make": with_everything, "dropout": 0.2}
    assert_same(shared(**settings), run(mesh=mesh, **settings))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2), MeshConfig(data=8), MeshConfig(data=2, fsdp=4)], ids=str
)
def test_a_corpus_shared_among_devices_equals_a_corpus_on_one(mesh: MeshConfig) -> None:
    one, many = shared(corpus=True), run(corpus=True, mesh=mesh)
    assert_same(one, many)
    assert one[1][0]["negatives"] == pytest.approx(39)  # 41 passages, two right answers


def test_fsdp_shares_weights_and_moments_out() -> None:
    """Every large array lies in eighths; what a device holds is about an eighth of it all."""
    state, _ = run(1, mesh=MeshConfig(fsdp=8))
    kernel = state.params["model"]["layers"][0]["mlp_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (128, 64)
    assert kernel.addressable_shards[0].data.shape == (128, 64)
    assert np.asarray(kernel).shape == (128, 512)
