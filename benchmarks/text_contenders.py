"""Those that `text.py` times, each in its own process (`training_contenders` says what a contender is)."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.training_contenders import Made, Maker, Wait
from prime_jax.data.sequences import PackedBatches, Sequences
from prime_jax.losses.corpus import in_chunks
from prime_jax.losses.objective import Objective
from prime_jax.models.text import TextConfig
from prime_jax.nn.bert import BertConfig
from prime_jax.types import Batch

LEARNING_RATE, WEIGHT_DECAY, TEMPERATURE = 1.5e-4, 0.01, 0.05
BATCHES = 4  # different ones, so that packed rows differ
SEPARATOR = 3


class Task(NamedTuple):
    """What is learned from.

    Attributes:
        lengths: Mean and spread of the conversations' tokens before they are cut.
        longest: Where they are cut.
        passages: How many passages are told apart.
        layers: Of the encoder.
        hidden: Its width.
    """

    lengths: tuple[float, float]
    longest: int = 96
    passages: int = 10882
    layers: int = 6
    hidden: int = 384


TASKS = {"conversations": Task((140.0, 60.0)), "questions": Task((26.0, 12.0))}
TINY = {name: task._replace(passages=100, layers=1, hidden=32) for name, task in TASKS.items()}


def model_config(task: Task) -> TextConfig:
    """The predictor, untrained."""
    encoder = {
        **{"model_type": "bert", "vocab_size": 30522, "hidden_size": task.hidden},
        **{"num_hidden_layers": task.layers, "num_attention_heads": task.hidden // 32},
        **{"intermediate_size": 4 * task.hidden, "max_position_embeddings": 512, "type_vocab_size": 2},
        **{"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    }
    return TextConfig(
        input_dim=task.hidden,
        output_dim=task.hidden,
        max_tokens=task.longest,
        encoder=BertConfig.parse(encoder, "config.json"),
        pooling="mean",
        separator_id=SEPARATOR,
    )


def conversations(task: Task, count: int) -> Sequences:
    """Random words of the task's lengths."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.normal(*task.lengths, count), 10, task.longest).astype(int)
    return Sequences.of([random.integers(1000, 20000, length).astype(np.int32) for length in lengths])


def passages(task: Task) -> np.ndarray:
    """Random unit vectors."""
    vectors = np.random.default_rng(1).standard_normal((task.passages, task.hidden), np.float32)
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def batches(task: Task, rows: int) -> list[Batch]:
    """Batches of so many rows each, with one right passage a row."""
    given, memory, made = conversations(task, BATCHES * rows), passages(task), []
    pack = PackedBatches(given, task.longest, devices=jax.local_device_count())
    for number in range(BATCHES):
        ids = (np.arange(rows) * 97 + number) % task.passages
        fields: dict[str, Any] = {
            "context": np.zeros((rows, 0, task.hidden), np.float32),
            "context_mask": np.zeros((rows, 0), bool),
            "query": memory[ids],
            "target": memory[ids],
            "target_id": ids,
            "positive_ids": ids[:, None],
            "example": ids,
            "conversations": pack(np.arange(number * rows, (number + 1) * rows), 0, 1),
        }
        made.append(Batch(**fields))
    return made


def ours(task: Task, rows: int, wait: Wait, *, dtype: Any = jnp.float32) -> Made:
    """The step of `python -m prime_jax.train` with configs/text.yaml; a call learns from all `rows`."""
    from prime_jax.config import MeshConfig, TrainingConfig
    from prime_jax.train.optim import make_optimizer
    from prime_jax.train.sharding import make_mesh, split_batch
    from prime_jax.train.state import build_graph, init_state
    from prime_jax.train.step import StepPlan, make_train_step

    rows //= BATCHES
    config = model_config(task)
    settings = TrainingConfig(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer, objective = make_optimizer(settings, 1000), Objective(temperature=TEMPERATURE)
    mesh = make_mesh(MeshConfig(), rows)
    plan = StepPlan(1000, inputs_of=config.inputs_of, compute_dtype=dtype)
    program = make_train_step(build_graph(config, dtype), optimizer, objective, plan, mesh)
    corpus, given = in_chunks(passages(task), 8192, mesh), batches(task, rows)
    wait()
    state = jax.jit(lambda: init_state(config, optimizer, 0, objective))()
    compiled: dict[Any, Any] = {}
    began = time.perf_counter()
    for batch in given:
        assert batch.conversations is not None
        shape = batch.conversations.tokens.shape
        if shape not in compiled:
            compiled[shape] = program.lower(state, split_batch(batch, mesh), corpus).compile()
    told = {"compile_s": time.perf_counter() - began, "programs": float(len(compiled))}
    held = [state]
    del state

    def step() -> Any:
        for batch in given:
            assert batch.conversations is not None
            run = compiled[batch.conversations.tokens.shape]
            held[0], metrics = run(held[0], split_batch(batch, mesh), corpus)
        return metrics["loss"]

    return step, told


def pytorch(task: Task, rows: int, wait: Wait, *, compiled: bool = False) -> Made:
    """Transformers' BertModel without dropout, as ours; a call learns from all `rows`."""
    import torch
    from torch.nn import functional
    from transformers import BertConfig as TheirConfig
    from transformers import BertModel

    rows //= BATCHES
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda"
    sizes = model_config(task).encoder
    assert sizes is not None
    fields = {**sizes.model_dump(), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: Any = BertModel(TheirConfig(**fields), add_pooling_layer=False)
    model = model.to(device)
    given, memory = conversations(task, BATCHES * rows), torch.tensor(passages(task), device=device)
    ready: list[Any] = []
    for number in range(BATCHES):
        chosen = np.arange(number * rows, (number + 1) * rows)
        width = int(given.lengths[chosen].max())
        tokens = torch.tensor(given.padded(chosen, width), dtype=torch.long, device=device)
        mask = torch.tensor(np.arange(width) < given.lengths[chosen][:, None], device=device)
        target = torch.tensor((np.arange(rows) * 97 + number) % task.passages, device=device)
        ready.append((tokens, mask, target))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss_of(tokens: Any, mask: Any, target: Any) -> Any:
        hidden = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = functional.normalize(pooled.float(), dim=-1) @ memory.T / TEMPERATURE
        return functional.cross_entropy(logits, target)

    run: Callable[..., Any] = torch.compile(loss_of, dynamic=True) if compiled else loss_of
    wait()

    def step() -> Any:
        for tokens, mask, target in ready:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = run(tokens, mask, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.detach()

    return step, {}


CONTENDERS: dict[str, Maker] = {
    "prime-jax": ours,
    "pytorch-eager": pytorch,
    "pytorch-compiled": partial(pytorch, compiled=True),
}
