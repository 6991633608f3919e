"""Those that `training.py` times, each in its own process, on the same model, batch and kind of optimizer.

A contender is a function that gets a model's shape and a batch size and gives back `step()`, which learns
from one batch and returns when that is done.
"""

import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.losses.corpus import in_chunks
from prime_jax.losses.objective import Objective
from prime_jax.models.prime import PredictorConfig
from prime_jax.nn.remat import Remat
from prime_jax.types import Batch

Step = Callable[[], float]
Made = tuple[Step, dict[str, float]]  # and what is known of its memory before it runs, in MB
TURNS = 10
LEARNING_RATE, WEIGHT_DECAY, CLIP, TEMPERATURE = 1e-4, 0.01, 1.0, 0.07
MB = 1e6


def random_batch(config: PredictorConfig, rows: int) -> Batch:
    """Full windows of random unit vectors, every row with a target of its own."""
    random = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        vectors = random.standard_normal((*shape, config.input_dim), np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors

    ids = np.arange(rows)
    fields: dict[str, Any] = {
        "context": unit(rows, TURNS),
        "context_mask": np.ones((rows, TURNS), bool),
        "query": unit(rows),
        "target": unit(rows),
        "target_id": ids,
        "positive_ids": ids[:, None],
        "example": ids,
    }
    return Batch(**fields)


def ours(
    config: PredictorConfig,
    rows: int,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    micro_batch: int = 0,
    passages: int = 0,
) -> Made:
    """The step of `python -m prime_jax.train`, on all devices."""
    from prime_jax.config import MeshConfig, TrainingConfig
    from prime_jax.train.optim import make_optimizer
    from prime_jax.train.sharding import make_mesh, split_batch, state_shardings
    from prime_jax.train.state import build_graph, init_state
    from prime_jax.train.step import StepPlan, make_train_step

    settings = TrainingConfig(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, gradient_clip_val=CLIP)
    optimizer, objective = make_optimizer(settings, 1000), Objective(temperature=TEMPERATURE)
    mesh = make_mesh(MeshConfig(), rows, micro_batch)
    plan = StepPlan(1000, remat, micro_batch, compute_dtype=dtype)
    program = make_train_step(build_graph(config, dtype), optimizer, objective, plan, mesh)

    def start() -> Any:
        return init_state(config, optimizer, 0, objective)

    state = jax.jit(start, out_shardings=state_shardings(mesh, jax.eval_shape(start)))()
    corpus = None
    if passages:
        embeddings = np.random.default_rng(1).standard_normal((passages, config.output_dim), np.float32)
        corpus = in_chunks(embeddings, 8192, mesh)
        del embeddings
    host = random_batch(config, rows)
    compiled = program.lower(state, split_batch(host, mesh), corpus).compile()
    counted = compiled.memory_analysis()
    memory = {
        "arguments_mb": counted.argument_size_in_bytes / MB,
        "temporaries_mb": counted.temp_size_in_bytes / MB,
    }
    held = [state]

    def step() -> float:
        held[0], metrics = compiled(held[0], split_batch(host, mesh), corpus)
        return float(metrics["loss"])

    return step, memory


def pytorch(config: PredictorConfig, rows: int, *, compiled: bool = False, bfloat16: bool = False) -> Made:
    """The same model as its users train it in PyTorch: AdamW, clipping, autocast where bfloat16."""
    import torch

    from prime_jax.export import torch_runtime

    names = torch_runtime.PredictorConfig.__dataclass_fields__
    shape = {name: value for name, value in config.model_dump().items() if name in names}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = torch_runtime.EmbeddingPredictor(torch_runtime.PredictorConfig(**shape)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    host = random_batch(config, rows)
    inputs = {
        name: torch.from_numpy(np.asarray(getattr(host, name)))
        for name in ("context", "query", "context_mask", "target")
    }
    run = torch.compile(model) if compiled else model

    def step() -> float:
        there = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            predicted = run(there["context"], there["query"], there["context_mask"])
        similarities = predicted.float() @ there["target"].T / TEMPERATURE
        loss = torch.nn.functional.cross_entropy(similarities, torch.arange(rows, device=device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.item())

    return step, {}


CONTENDERS: dict[str, Callable[..., Made]] = {
    "prime-jax float32": ours,
    "prime-jax bfloat16": partial(ours, dtype=jnp.bfloat16),
    "PyTorch eager float32": pytorch,
    "PyTorch compiled float32": partial(pytorch, compiled=True),
    "PyTorch eager bfloat16": partial(pytorch, bfloat16=True),
}


def serve(make: Callable[..., Made], config: PredictorConfig, rows: int, warm: int, pipe: Connection) -> None:
    """Run one contender: `warm` steps, then time as many as the parent asks for, then tell its memory."""
    try:
        step, memory = make(config, rows)
        losses = [step() for _ in range(warm)]
    except Exception as unavailable:  # the parent reports it and goes on with the others
        lines = str(unavailable).strip().splitlines() or [""]
        pipe.send(f"{type(unavailable).__name__}: {lines[-1][:200]}")
        return
    pipe.send({"first_losses": losses, **memory})
    while (times := pipe.recv()) is not None:
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
        pipe.send(taken)
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak too
    peak = {"host_mb": next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))}
    used = jax.devices()[0].memory_stats()
    if used and "peak_bytes_in_use" in used:
        peak["device_mb"] = used["peak_bytes_in_use"] / MB
    pipe.send(peak)
