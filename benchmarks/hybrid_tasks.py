"""The tasks of `hybrid.py`, small enough for one core: batches, a loss, control and validation sets.

`embed`: the embedding predictor on a data folder. `lm`: a byte-level language model on the same
folder's passages. `with_lora`: either of them, its base frozen and low-rank factors trained.
Control and validation rows are of different documents, all of them from the dev split; nobody trains on them.
A control batch is an eighth of a training batch, and costs as much; where rows are told from each other,
those of one are told from as many passages as those of a training batch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prime_jax.data.control import in_company
from prime_jax.data.embedded import embed_dataset
from prime_jax.data.encode import load_encoder
from prime_jax.data.prepare import prepare
from prime_jax.data.records import load_dataset
from prime_jax.losses.objective import Objective
from prime_jax.models.prime import PredictorConfig
from prime_jax.train.state import build_graph, pure_params
from prime_jax.types import Batch

CONTROL = 128  # batches kept aside, at most
SHARE = 8  # of a training batch is a control batch


class Task(NamedTuple):
    """What is trained.

    Attributes:
        init: Weights from a seed.
        loss: `(weights, batch) -> loss`.
        batches: `(seed, step) -> batch`: the order of a run.
        control: Batches that decide what stays.
        validation: Batches that everything is judged on, once.
        about: Sizes, for the file of results.
    """

    init: Callable[[int], Any]
    loss: Callable[[Any, Any], Any]
    batches: Callable[[int, int], Any]
    control: list[Any]
    validation: list[Any]
    about: dict[str, Any]


def embed(
    folder: Path,
    *,
    rows: int = 64,
    turns: int = 2,
    hidden: int = 128,
    noise: float = 0.03,
) -> Task:
    """The embedding predictor: InfoNCE within the batch, no dropout.

    Training inputs are blurred by `noise` per component: the rows are few, and without it the loss stops
    falling after some epochs, so that nothing can be read off it.
    """
    encoder = load_encoder("minilm")
    dataset, store = prepare(folder, ("train", "dev"), encoder)
    data = embed_dataset(dataset, store, max_context_length=turns)
    corpus = data.corpus()
    model = PredictorConfig(
        input_dim=encoder.dim,
        output_dim=encoder.dim,
        hidden_dim=hidden,
        num_layers=1,
        num_heads=4,
        max_context_length=turns,
        residual="copy",
        dropout=0.0,
    )
    graph, objective = build_graph(model, jnp.float32), Objective(temperature=0.05)
    arrays = {name: data.splits[name].arrays(store) for name in ("train", "dev")}
    targets = {name: np.array([ids[0] for ids in data.splits[name].positives]) for name in arrays}

    def batch(split: str, at: np.ndarray) -> Batch:
        context, mask, query = arrays[split]
        ids = targets[split][at]
        parts: list[Any] = [context[at], mask[at], query[at], np.asarray(corpus[ids]), ids, ids[:, None], at]
        return Batch(*parts)

    def loss(params: Any, given: Batch) -> Any:
        inputs = (given.context, given.query, given.context_mask)
        prediction = nnx.merge(graph, params).details(*inputs, dropout_key=None)
        return objective(prediction, given, {})[0]

    random, trained = np.random.default_rng(0), np.arange(len(targets["train"]))
    documents = np.array([example.id.rsplit("/", 1)[0] for example in dataset.splits["dev"]])
    small = rows // SHARE
    chosen, judging = apart(documents, CONTROL * small, random)
    control = [batch("dev", chosen[at * small : (at + 1) * small]) for at in range(len(chosen) // small)]

    def batches(seed: int, step: int) -> Batch:
        per_epoch = len(trained) // rows
        order = np.random.default_rng((seed, step // per_epoch)).permutation(trained)
        at = step % per_epoch * rows
        given = batch("train", order[at : at + rows])
        random = np.random.default_rng((seed, step, 1))
        blurred = (x + noise * random.normal(size=x.shape).astype(np.float32) for x in given[:3:2])
        context, query = blurred
        return given._replace(context=context, query=query)

    return Task(
        lambda seed: pure_params(model.build(rngs=nnx.Rngs(seed))),
        loss,
        batches,
        in_company(control, rows),
        [batch("dev", judging[at * rows : (at + 1) * rows]) for at in range(len(judging) // rows)],
        {
            "batch": rows,
            "hidden": hidden,
            "layers": 1,
            "turns": turns,
            "noise": noise,
            "train rows": len(trained),
            "control rows": len(control) * small,
            "dev rows": len(judging) // rows * rows,
        },
    )


def apart(documents: np.ndarray, wanted: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of half of the documents, as evenly as can be, for the control set; all rows of the others."""
    names = random.permutation(np.unique(documents))
    order = random.permutation(np.flatnonzero(np.isin(documents, names[: len(names) // 2])))
    turn = np.zeros(len(order), int)  # the how many-th of its document a row is
    for name in names:
        mine = documents[order] == name
        turn[mine] = np.arange(np.sum(mine))
    chosen = order[np.argsort(turn, kind="stable")[:wanted]]
    judging = np.flatnonzero(np.isin(documents, names[len(names) // 2 :]))
    return random.permutation(chosen), random.permutation(judging)


def lm(folder: Path, *, rows: int = 8, length: int = 32, width: int = 64, layers: int = 2) -> Task:
    """A byte-level transformer language model; validation is the dev documents' own passages' text."""
    dataset = load_dataset(folder, ("train", "dev"))
    later = {name for example in dataset.splits["dev"] for name in example.positives}
    random = np.random.default_rng(0)
    documents = sorted({name.rsplit("/", 1)[0] for name in later})
    kept = set(random.permutation(np.array(documents))[: len(documents) // 4].tolist())

    def part_of(name: str) -> str:
        document = name.rsplit("/", 1)[0]
        return "train" if name not in later else "control" if document in kept else "dev"

    texts: dict[str, list[str]] = {"train": [], "control": [], "dev": []}
    for passage in dataset.corpus:
        texts[part_of(passage.id)].append(passage.text)
    pieces = {part: np.frombuffer("\n\n".join(told).encode(), np.uint8) for part, told in texts.items()}

    def batch(part: str, generator: np.random.Generator, rows: int = rows) -> np.ndarray:
        text = pieces[part]
        starts = generator.integers(0, len(text) - length - 1, rows)
        return np.stack([text[at : at + length + 1] for at in starts]).astype(np.int32)

    def init(seed: int) -> Any:
        keys = iter(jax.random.split(jax.random.key(seed), 4 * layers + 2))

        def matrix(*shape: int, scale: float = 1.0) -> Any:
            return jax.random.normal(next(keys), shape) * scale / np.sqrt(shape[0])

        blocks = [
            {
                "qkv": matrix(width, 3 * width),
                "out": matrix(width, width, scale=0.5),
                "up": matrix(width, 4 * width),
                "down": matrix(4 * width, width, scale=0.5),
                "scale": jnp.ones((2, width)),
            }
            for _ in range(layers)
        ]
        return {
            "embed": matrix(256, width, scale=4.0),
            "position": matrix(length, width, scale=1.0),
            "blocks": blocks,
            "last": jnp.ones(width),
        }

    def norm(x: Any, scale: Any) -> Any:
        return x * scale * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def loss(params: Any, text: Any) -> Any:
        x = params["embed"][text[:, :-1]] + params["position"]
        for block in params["blocks"]:
            q, k, v = jnp.split(norm(x, block["scale"][0]) @ block["qkv"], 3, axis=-1)
            q, k, v = (part.reshape(*part.shape[:2], 4, width // 4) for part in (q, k, v))
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.reshape(x.shape) @ block["out"]
            x = x + jax.nn.gelu(norm(x, block["scale"][1]) @ block["up"]) @ block["down"]
        logits = norm(x, params["last"]) @ params["embed"].T / np.sqrt(width)
        told = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(told, text[:, 1:, None], axis=-1))

    return Task(
        init,
        loss,
        lambda seed, step: batch("train", np.random.default_rng((seed, step))),
        [batch("control", random, rows // SHARE) for _ in range(CONTROL)],
        [batch("dev", random) for _ in range(128)],
        {"batch": rows, "length": length, "width": width, "layers": layers, "bytes": len(pieces["train"])},
    )


def with_lora(task: Task, base: Any, rank: int = 4) -> Task:
    """The same task, with only low-rank factors of its matrices trained on top of frozen weights."""
    leaves: list[Any] = jax.tree.leaves(base)
    structure: Any = jax.tree.structure(base)
    large = [at for at, leaf in enumerate(leaves) if leaf.ndim == 2 and min(leaf.shape) >= 4 * rank]

    def init(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), len(large))
        return {
            str(at): {
                "down": jax.random.normal(key, (leaves[at].shape[0], rank)) / np.sqrt(leaves[at].shape[0]),
                "up": jnp.zeros((rank, leaves[at].shape[1])),
            }
            for key, at in zip(keys, large, strict=True)
        }

    def loss(params: Any, given: Any) -> Any:
        merged = list(leaves)
        for at in large:
            merged[at] = leaves[at] + params[str(at)]["down"] @ params[str(at)]["up"]
        return task.loss(structure.unflatten(merged), given)

    return task._replace(init=init, loss=loss, about={**task.about, "rank": rank})


TASKS: dict[str, Callable[[Path], Task]] = {"embed": embed, "lm": lm}
