"""What a step will take of each device's memory, told before it runs, and what helps when it is too much."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from prime_jax.config import Config
from prime_jax.errors import ConfigError

GB = 1e9


@dataclass(frozen=True)
class Needs:
    """Bytes on each device during a step.

    Attributes:
        state: Weights, optimizer, and what else is kept from step to step (updated in place).
        data: The batch, and the passages where all of them are negatives.
        working: Activations, gradients and everything else that lives during a step only.
    """

    state: int
    data: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.data + self.working


def needs_of(compiled: Any, state: Any) -> Needs:
    """What a compiled step needs, by XLA's own account.

    Args:
        compiled: What `.lower(...).compile()` gave; it donates `state`.
        state: The state it takes.
    """
    counted = compiled.memory_analysis()
    kept = bytes_per_device(state)
    results = max(0, counted.output_size_in_bytes - counted.alias_size_in_bytes)
    data = max(0, counted.argument_size_in_bytes - kept)
    return Needs(kept, data, counted.temp_size_in_bytes + results)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a pytree's arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        elements = 1
        for length in leaf.sharding.shard_shape(leaf.shape):
            elements *= length
        total += elements * leaf.dtype.itemsize
    return total


def available(device: jax.Device) -> int | None:
    """Bytes that a device has for us; on CPUs an equal share of what is free now; None where nobody knows."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    meminfo = Path("/proc/meminfo")
    if device.platform != "cpu" or not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 // jax.local_device_count()


def describe(needs: Needs, limit: int | None) -> str:
    """One line for people."""
    of = "" if limit is None else f" of {limit / GB:.1f}"
    return (
        f"memory of a step on each device: {needs.total / GB:.2f} GB{of} (weights and optimizer "
        f"{needs.state / GB:.2f}, data {needs.data / GB:.2f}, activations and gradients "
        f"{needs.working / GB:.2f})"
    )


def check(needs: Needs, limit: int | None, config: Config) -> None:
    """Refuse a step that cannot fit.

    On CPUs the state and the data are in memory already, so only the rest is asked for.

    Raises:
        ConfigError: With the settings that would help.
    """
    asked = needs.working if jax.default_backend() == "cpu" else needs.total
    if limit is not None and asked > limit:
        raise ConfigError(f"{describe(needs, limit)}: that cannot fit. {suggestions(config)}")


def explain_exhausted(error: Exception, config: Config) -> ConfigError:
    """What to tell a user when a device ran out of memory after all."""
    first = next(iter(str(error).splitlines()), "")
    return ConfigError(f"a device ran out of memory ({first}). {suggestions(config)}")


def suggestions(config: Config) -> str:
    """The settings that save memory and are not in use yet, the cheapest first; each by itself is valid."""
    train, mesh = config.train, config.mesh
    devices = jax.device_count() if mesh.data == -1 else mesh.data * mesh.fsdp
    rows = train.micro_batch_size or train.batch_size
    fewer_rows = _even_share(train.batch_size, max(rows // 4, devices), devices)
    half = train.batch_size // 2
    half -= half % (train.micro_batch_size or devices)
    candidates = [
        (not train.mixed_precision, "--train.mixed-precision true"),
        (not train.gradient_checkpointing, "--train.gradient-checkpointing true"),
        (
            train.gradient_checkpointing and train.remat_policy == "dots",
            "--train.remat-policy blocks",
        ),
        (0 < fewer_rows < rows, f"--train.micro-batch-size {fewer_rows} (the same result)"),
        (
            mesh.fsdp < devices,
            f"--mesh.fsdp {devices}{'' if mesh.data == -1 else ' --mesh.data 1'} "
            "(shares weights and optimizer out)",
        ),
        (
            half > 0,
            f"--train.batch-size {half}{' (fewer negatives)' if train.negatives == 'batch' else ''}",
        ),
    ]
    useful = [words for helps, words in candidates if helps] or ["a smaller model"]
    return f"What helps, the cheapest first: {'; '.join(useful)}"


def _even_share(batch: int, most: int, devices: int) -> int:
    """The most rows, up to `most`, that divide the batch and that the devices divide; 0 if there are none."""
    rows = range(most - most % devices, 0, -devices)
    return next((count for count in rows if batch % count == 0), 0)
