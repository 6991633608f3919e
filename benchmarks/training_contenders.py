"""Those that `training.py` times, each in its own process, on the same model, batch, loss and optimizer.

A contender is a function that gets a model's shape and a batch size (and `wait`, to be called when all is
loaded and before anything compiles) and gives back `step()`, which learns from one batch and gives its loss,
which `float` waits for.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side_by_side import Start, peak_memory
from prime_jax.losses.corpus import in_chunks
from prime_jax.losses.objective import Objective
from prime_jax.models.prime import PredictorConfig
from prime_jax.nn.remat import Remat
from prime_jax.types import Batch

Step = Callable[[], Any]
Wait = Callable[[], None]
Made = tuple[Step, dict[str, float]]  # and what is known of its memory before it runs, in MB
Maker = Callable[..., Made]
TURNS = 10
LEARNING_RATE, WEIGHT_DECAY, CLIP, TEMPERATURE = 1e-4, 0.01, 1.0, 0.07
MB = 1e6
TINY = PredictorConfig(input_dim=32, output_dim=32, hidden_dim=128, num_layers=1, num_heads=4)
TINY_ROWS = 16


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


class OurStep(NamedTuple):
    """The step of `python -m prime_jax.train`, compiled for one batch size.

    Attributes:
        lowered: What was compiled; `as_text()` shows it.
        compiled: `compiled(state, batch, corpus) -> (state, metrics)`; it takes over the state's memory.
        state: The state that training starts with.
        host: The batch, numpy.
        place: Puts it on the devices.
        corpus: All passages, where they are the negatives.
    """

    lowered: Any
    compiled: Any
    state: Any
    host: Batch
    place: Callable[[Batch], Batch]
    corpus: Any


def our_step(
    config: PredictorConfig,
    rows: int,
    wait: Wait = lambda: None,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    micro_batch: int = 0,
    passages: int = 0,
) -> OurStep:
    """Compile our step, on all devices."""
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

    wait()
    state = jax.jit(start, out_shardings=state_shardings(mesh, jax.eval_shape(start)))()
    corpus = None
    if passages:
        embeddings = np.random.default_rng(1).standard_normal((passages, config.output_dim), np.float32)
        corpus = in_chunks(embeddings, 8192, mesh)
        del embeddings
    host = random_batch(config, rows)
    lowered = program.lower(state, split_batch(host, mesh), corpus)
    return OurStep(lowered, lowered.compile(), state, host, partial(split_batch, mesh=mesh), corpus)


def ours(config: PredictorConfig, rows: int, wait: Wait, *, resident: bool = False, **options: Any) -> Made:
    """Our step with the options of `our_step`; `resident`: the batch lies on the devices already."""
    made = our_step(config, rows, wait, **options)
    counted = made.compiled.memory_analysis()
    memory = {
        "arguments_mb": counted.argument_size_in_bytes / MB,
        "temporaries_mb": counted.temp_size_in_bytes / MB,
    }
    held = [made.state]
    there = made.place(made.host) if resident else None
    made = made._replace(state=None)  # the first step takes its memory

    def step() -> Any:
        batch = made.place(made.host) if there is None else there
        held[0], metrics = made.compiled(held[0], batch, made.corpus)
        return metrics["loss"]

    return step, memory


def pytorch(
    config: PredictorConfig,
    rows: int,
    wait: Wait,
    *,
    compiled: bool = False,
    precision: Literal["float32", "autocast", "bfloat16"] = "float32",
    resident: bool = False,
) -> Made:
    """The same model as its users train it in PyTorch: InfoNCE, clipping, AdamW (fused on a GPU).

    Args:
        config: The model.
        rows: Batch size.
        wait: See above.
        compiled: Compile forward pass and loss.
        precision: `autocast` keeps float32 weights and rounds them in every forward pass; `bfloat16` computes
            with bfloat16 weights and lets AdamW move a float32 copy of them.
        resident: The batch lies on the device already.
    """
    import torch

    from prime_jax.export import torch_runtime

    names = torch_runtime.PredictorConfig.__dataclass_fields__
    shape = {name: value for name, value in config.model_dump().items() if name in names}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = torch_runtime.EmbeddingPredictor(torch_runtime.PredictorConfig(**shape)).to(device).train()
    weights = list(model.parameters())
    updated = weights
    if precision == "bfloat16":
        updated = [weight.detach().clone() for weight in weights]  # float32, what the optimizer moves
        model.bfloat16()
    optimizer = torch.optim.AdamW(
        updated, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True if device == "cuda" else None
    )
    host = random_batch(config, rows)
    inputs = {
        name: torch.from_numpy(np.asarray(getattr(host, name)))
        for name in ("context", "query", "context_mask", "target")
    }
    if resident:
        inputs = {name: value.to(device) for name, value in inputs.items()}
    right = torch.arange(rows, device=device)

    def forward(context: Any, query: Any, context_mask: Any, target: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            predicted = model(context, query, context_mask)
        with torch.autocast(device, enabled=False):
            similarities = predicted.float() @ target.T / TEMPERATURE
            return torch.nn.functional.cross_entropy(similarities, right)

    loss_of = torch.compile(forward, dynamic=False) if compiled else forward

    def gradient() -> Any:
        there = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
        loss = loss_of(**there)
        loss.backward()
        return loss

    def step() -> Any:
        loss = gradient()
        if updated is not weights:
            for copy, weight in zip(updated, weights, strict=True):
                copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(updated, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if updated is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, updated)
        return loss.detach()

    if device == "cuda":  # kernels are chosen and compiled now; the memory is free for others meanwhile
        wait()
        gradient()
        for weight in weights:
            weight.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return step, {}


CONTENDERS: dict[str, Maker] = {
    "prime-jax float32": ours,
    "prime-jax bfloat16": partial(ours, dtype=jnp.bfloat16),
    "PyTorch eager float32": pytorch,
    "PyTorch compiled float32": partial(pytorch, compiled=True),
    "PyTorch eager bfloat16": partial(pytorch, precision="autocast"),
}
_ours_bf16 = partial(ours, dtype=jnp.bfloat16, resident=True)
_peer = partial(pytorch, resident=True)
DEFAULT_MODEL: dict[str, Maker] = {  # in the order in which they are timed
    "bfloat16, remat none": _ours_bf16,
    "PyTorch eager bfloat16": partial(_peer, precision="autocast"),
    "PyTorch eager bfloat16 weights": partial(_peer, precision="bfloat16"),
    "PyTorch compiled bfloat16": partial(_peer, precision="autocast", compiled=True),
    "bfloat16, remat blocks": partial(_ours_bf16, remat="blocks"),
    "bfloat16, micro-batch": partial(_ours_bf16, micro_batch=512),
    "PyTorch compiled bfloat16 weights": partial(_peer, precision="bfloat16", compiled=True),
}
TINY_MODEL: dict[str, Maker] = {
    "bfloat16, remat none": _ours_bf16,
    "PyTorch eager bfloat16": DEFAULT_MODEL["PyTorch eager bfloat16"],
    "PyTorch eager bfloat16 weights": DEFAULT_MODEL["PyTorch eager bfloat16 weights"],
    "bfloat16, micro-batch": partial(_ours_bf16, micro_batch=8, remat="blocks"),
}


def is_ours(maker: Maker) -> bool:
    """Whether a contender is our step, with whatever options."""
    return maker is ours or getattr(maker, "func", None) is ours


def serve(make: Maker, config: PredictorConfig, rows: int, start: Start) -> None:
    """Run one contender.

    An order is `(times, in_a_row)`: its answer are the losses of so many groups of steps and their seconds,
    those of a step; the loss of a group is that of its last step, and waits for all of them. Or it is None:
    peak memory, and the end.
    """
    try:
        step, memory = make(config, rows, start.wait)
    except Exception as unavailable:
        start.failed(unavailable)
        return
    start.ready(memory)
    while (order := start.pipe.recv()) is not None:
        times, in_a_row = order
        losses, taken = [], []
        try:
            for _ in range(times):
                started = time.perf_counter()
                for _ in range(in_a_row):
                    loss = step()
                losses.append(float(loss))
                taken.append((time.perf_counter() - started) / in_a_row)
        except Exception as failed:  # most likely too little memory; the parent reports it
            lines = str(failed).strip().splitlines() or [""]
            start.pipe.send(f"{type(failed).__name__}: {lines[0][:200]}")
            return
        start.pipe.send((losses, taken))
    start.pipe.send(peak_memory())
