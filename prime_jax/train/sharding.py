"""How arrays lie on the devices of all processes.

The mesh has two axes. The rows of a batch are split over both; weights and optimizer state are split over
`fsdp` and repeated along `data`. Where the two axes come from one process or many makes no difference.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prime_jax.config import MeshConfig
from prime_jax.errors import ConfigError
from prime_jax.types import Batch

AXES = ("data", "fsdp")
SMALLEST_SHARED = 2**14  # elements; less is not worth the traffic of putting it together again


def make_mesh(config: MeshConfig, batch_size: int, micro_batch_size: int = 0) -> Mesh:
    """A mesh of `config.data` groups of `config.fsdp` devices (data -1: as many groups as there are).

    Raises:
        ConfigError: If the devices do not suffice or do not come out even, several processes would leave some
            unused, or the batch does not divide evenly among them.
    """
    devices = jax.devices()
    fsdp = config.fsdp
    if config.data == -1 and len(devices) % fsdp:
        raise ConfigError(f"mesh.fsdp {fsdp} does not divide the {len(devices)} devices")
    data = len(devices) // fsdp if config.data == -1 else config.data
    count = data * fsdp
    if not 1 <= count <= len(devices):
        raise ConfigError(
            f"mesh.data is {config.data} and mesh.fsdp {fsdp}, but there are {len(devices)} devices"
        )
    if jax.process_count() > 1 and count != len(devices):
        raise ConfigError(
            f"mesh.data {config.data} times mesh.fsdp {fsdp} leaves {len(devices) - count} of "
            f"{len(devices)} devices unused; with several processes all take part: set mesh.data to -1"
        )
    for name, rows in (("batch_size", batch_size), ("micro_batch_size", micro_batch_size)):
        if rows % count:
            raise ConfigError(f"train.{name} {rows} does not divide evenly among {count} devices")
    return Mesh(np.asarray(devices[:count]).reshape(data, fsdp), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, P(AXES))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Where every array of a state lives: large ones split over `fsdp` along their longest fitting axis.

    The rule looks at shapes alone, so that the optimizer's moments lie as the weights they belong to.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, length in enumerate(leaf.shape) if length % parts == 0]
        if parts == 1 or leaf.size < SMALLEST_SHARED or not fitting:
            return replicated(mesh)
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * longest, "fsdp"))

    return jax.tree.map(place, state)


def split_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Put this process's rows of a batch on its devices; together they are one array over the whole mesh."""
    sharding = by_rows(mesh)
    placed: Batch = jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )
    return placed


def spread_out(host: Any, sharding: Any) -> Any:
    """Put host arrays that every process has in full on the devices as `sharding` (one or a tree) says."""

    def put(array: Any, where: NamedSharding) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, where, lambda at: whole[at])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda array: put(array, sharding), host)
    return jax.tree.map(put, host, sharding)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays that may lie in shares on many devices, whole and on this process's own."""
    whole = jax.jit(lambda value: value, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), whole)
