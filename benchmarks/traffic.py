"""How many bytes a training step sends between devices, counted in the program that XLA made of it.

    python -m benchmarks.traffic --out benchmarks/results

Compiles the step of the default 206M model for several meshes of eight (virtual) devices, without running it,
and adds up the results of its collective operations. Writes traffic.json.
"""

import argparse
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.common import facts
from benchmarks.training_contenders import random_batch
from prime_jax.config import MeshConfig, TrainingConfig
from prime_jax.files import write_json
from prime_jax.losses.objective import Objective
from prime_jax.models.prime import PredictorConfig
from prime_jax.progress import console
from prime_jax.train.optim import make_optimizer
from prime_jax.train.sharding import by_rows, make_mesh, state_shardings
from prime_jax.train.state import build_graph, init_state
from prime_jax.train.step import StepPlan, make_train_step

ROWS = 512
MESHES = {
    "data 8": (MeshConfig(data=8), 0),
    "data 4, fsdp 2": (MeshConfig(data=4, fsdp=2), 0),
    "fsdp 8": (MeshConfig(fsdp=8), 0),
    "data 8, in 4 turns": (MeshConfig(data=8), ROWS // 4),
}
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u16": 2, "s64": 8, "f16": 2}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collective_bytes(program: str) -> dict[str, int]:
    """Bytes that the collective operations of a compiled program's text give to each device, by kind.

    An operation within a loop counts once; the caller knows how often the loop runs.
    """
    found: Counter[str] = Counter()
    for result, kind in re.findall(rf"= (.+?) ({COLLECTIVES})(?:-start)?\(", program):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            elements = 1
            for length in filter(None, shape.split(",")):
                elements *= int(length)
            found[kind] += elements * SIZES[dtype]
    return dict(found)


def traffic(mesh_config: MeshConfig, micro_batch: int) -> dict[str, Any]:
    """The collectives of one step of the default model, without remat."""
    config, objective = PredictorConfig(), Objective()
    optimizer = make_optimizer(TrainingConfig(), 1000)
    mesh = make_mesh(mesh_config, ROWS, micro_batch)

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
        )

    state = jax.eval_shape(lambda: init_state(config, optimizer, 0, objective))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_batch(config, ROWS)))
    rows = jax.tree.map(lambda _: by_rows(mesh), batch)
    plan = StepPlan(1000, "none", micro_batch, compute_dtype=jnp.bfloat16)
    step = make_train_step(build_graph(config, jnp.bfloat16), optimizer, objective, plan, mesh)
    lowered = step.lower(placed(state, state_shardings(mesh, state)), placed(batch, rows))
    compiled = lowered.compile()
    counted = compiled.memory_analysis()
    return {
        "collectives_mb": {k: v / 1e6 for k, v in collective_bytes(compiled.as_text()).items()},
        "arguments_mb_per_device": counted.argument_size_in_bytes / 1e6,
        "temporaries_mb_per_device": counted.temp_size_in_bytes / 1e6,
    }


def main() -> None:
    """Count for every mesh and write the figures down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    given = parser.parse_args()
    results = {name: traffic(*setting) for name, setting in MESHES.items()}
    table = Table("mesh", "received by each device, MB", "weights, optimizer and batch, MB", "working, MB")
    for name, result in results.items():
        moved = ", ".join(f"{kind} {size:,.1f}" for kind, size in result["collectives_mb"].items())
        kept, working = result["arguments_mb_per_device"], result["temporaries_mb_per_device"]
        table.add_row(name, moved, f"{kept:,.0f}", f"{working:,.0f}")
    console.print(table)
    write_json(given.out / "traffic.json", {**facts("jax", "flax", "optax"), "rows": ROWS, "meshes": results})


if __name__ == "__main__":
    main()
