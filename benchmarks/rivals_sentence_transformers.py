"""sentence-transformers' own trainer on the conversation's text: what a user would train instead.

    pip install "sentence-transformers[train]" torch==2.13.0

Tried with sentence-transformers 6.2.0, datasets 5.2.0, accelerate 1.15.0 and transformers 5.24.0, which go
with `constraints.txt`. The encoder starts as that of the memory and reads what `Task.conversation` writes.

`query_side` leaves the passages, and so the index, as they are. Its loss is that of our predictors: InfoNCE
of every right answer against all passages. MultipleNegativesRankingLoss knows the batch's passages alone,
each of them wrong for every other row, so the loss is a module of our own; trainer and collator are the
library's, which hands a row's number over as its label. `both_sides` is what the library's documentation
describes: pairs, in-batch negatives without duplicates, and an index that must be encoded anew.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy import ndarray
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import PrinterCallback, TrainerCallback

from benchmarks.rivals_methods import FLOAT32, Cell, FineTuning, Task, milliseconds
from prime_jax.files import user_path
from prime_jax.progress import progress
from prime_jax.retrieval.metrics import mean_reciprocal_rank


class CorpusSoftmaxLoss(torch.nn.Module):
    """InfoNCE of each right answer against all passages that are not one, averaged over the right answers.

    The sibling in torch of `prime_jax.losses.corpus.corpus_info_nce`.

    Args:
        model: The query side.
        corpus: Unit-norm embeddings of all passages, `[M, E]`; they stay.
        positives: Rows of the corpus that answer each training example; its number is its label.
        temperature: Divides the cosine similarities.
    """

    def __init__(self, model: Any, corpus: ndarray, positives: Sequence[ndarray], temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.register_buffer("corpus", torch.from_numpy(np.array(corpus, np.float32)))
        self.positives = [torch.from_numpy(rows) for rows in positives]

    def forward(self, features: Sequence[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch: tokens of its conversations, and the numbers `[B]` of its examples."""
        predicted = self.model(next(iter(features)))["sentence_embedding"]
        predicted = torch.nn.functional.normalize(predicted, dim=-1)
        scores = predicted @ self.get_buffer("corpus").T / self.temperature
        right = torch.zeros_like(scores, dtype=torch.bool)
        for row, label in enumerate(labels.tolist()):
            right[row, self.positives[label].to(scores.device)] = True
        wrong = torch.logsumexp(scores.masked_fill(right, -torch.inf), dim=1, keepdim=True)
        losses = (torch.logaddexp(scores, wrong) - scores).masked_fill(~right, 0.0)
        return (losses.sum(dim=1) / right.sum(dim=1)).mean()


class _Watch(TrainerCallback):
    """Shows progress, and keeps the weights of the epoch that is best on dev."""

    def __init__(self, model: Any, judge: Callable[[], float], advance: Callable[..., None]):
        self.model, self.judge, self.advance = model, judge, advance
        self.scores: list[float] = []
        self.best: Any = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.advance(1)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        score = self.judge()
        if self.best is None or score > max(self.scores):
            self.best = copy.deepcopy(self.model.state_dict())
        self.scores.append(score)


def query_side(task: Task, options: FineTuning, seed: int) -> Cell:
    """Train the encoder of conversations; passages stay as they are encoded."""
    train, model = task.data.splits["train"], _start(task)
    rows: dict[str, list[Any]] = {
        "conversation": task.conversations("train"),
        "label": list(range(len(train.query))),
    }
    loss = CorpusSoftmaxLoss(model, task.data.corpus.embeddings[:], train.positives, options.temperature)
    return _cell(task, model, loss, rows, options, seed, lambda: None)


def both_sides(task: Task, options: FineTuning, seed: int) -> Cell:
    """Train one encoder of conversations and passages on pairs; the passages are encoded anew."""
    passages = [task.source.passage_prefix + passage.text for passage in task.dataset.corpus]
    conversations, model = task.conversations("train"), _start(task)
    longest = model.get_max_seq_length()
    pairs = [
        (conversations[row], passages[answer])
        for row, answers in enumerate(task.data.splits["train"].positives)
        for answer in answers
    ]
    rows = {"anchor": [one for one, _ in pairs], "positive": [other for _, other in pairs]}
    loss = MultipleNegativesRankingLoss(model, scale=1 / options.temperature)

    def memory() -> ndarray:
        return _encode(model, passages, longest)

    return _cell(task, model, loss, rows, options, seed, memory, batch_sampler="no_duplicates")


def _start(task: Task) -> Any:
    """The memory's encoder, as sentence-transformers loads it."""
    encoder: Any = task.encoder
    named = user_path(task.source.encoder)
    return SentenceTransformer(str(named if named.is_dir() else encoder.source.transformer))


def _cell(
    task: Task,
    model: Any,
    loss: Any,
    rows: dict[str, list[Any]],
    options: FineTuning,
    seed: int,
    memory: Callable[[], ndarray | None],
    **more: Any,
) -> Cell:
    """Train, take the epoch that is best on dev, and measure it; `memory` encodes the passages anew."""
    tokens = min(options.tokens, model.get_max_seq_length())
    model.max_seq_length = tokens
    dev, dev_texts = task.data.splits["dev"], task.conversations("dev")

    def judge() -> float:
        found = task.search(_encode(model, dev_texts, tokens), "dev", memory())
        return float(mean_reciprocal_rank(found[None], dev.positives)[0])

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=options.warmup,
            seed=seed,
            data_seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **more,
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), loss=loss
        )
        trainer.remove_callback(PrinterCallback)
        steps = len(trainer.get_train_dataloader()) * options.epochs
        with progress("sentence-transformers", steps, "steps") as advance:
            watch = _Watch(model, judge, advance)
            trainer.add_callback(watch)
            trainer.train()
    model.load_state_dict(watch.best)
    seconds = time.perf_counter() - started
    anew = memory()
    found = task.search(_encode(model, task.conversations(task.split), tokens), task.split, anew)
    ms = milliseconds(lambda one: _encode(model, [task.conversation(one)], tokens), task.examples)
    megabytes = FLOAT32 * sum(weight.numel() for weight in model.parameters()) / 1e6
    best = int(np.argmax(watch.scores))
    about = {"dev_MRR@10": watch.scores, "best_epoch": best + 1, "steps": steps}
    return Cell(found, seconds, anew is not None, ms, ms, megabytes, about)


def _encode(model: Any, texts: Sequence[str], tokens: int) -> ndarray:
    """Unit-norm embeddings of texts cut at `tokens`; where training cuts is left as it is."""
    before, model.max_seq_length = model.max_seq_length, tokens
    vectors = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    model.max_seq_length = before
    return np.asarray(vectors, np.float32)
