"""The methods that `rivals.py` sets beside each other: each gives rankings and what they cost."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from benchmarks.study import Opened, opened, trained
from prime_jax import load
from prime_jax.config import Config, DataConfig
from prime_jax.data.encode import Encoder, load_encoder, names_code
from prime_jax.data.one_text import as_one_text
from prime_jax.data.records import Dataset, Example, load_dataset
from prime_jax.errors import ConfigError, DataError
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.baselines import (
    Baseline,
    last_turn_concat,
    query,
    recency_mix,
    tune,
)
from prime_jax.evaluate.evaluation import PREDICTED
from prime_jax.evaluate.linear import ridge, ridge_context
from prime_jax.evaluate.run import evaluate_run, predictions
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.predict.text import encoder_of
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.pair import PairedEncoder
from prime_jax.pretrained.weights import weight_files
from prime_jax.retrieval.metrics import DEPTH, mean_reciprocal_rank
from prime_jax.retrieval.vectors import unit

TOKENS = 96
"""Where the conversation's text is cut."""
TIMED = 50
"""Questions that are timed, the first of the split."""
FLOAT32 = 4  # bytes

BASELINES: Mapping[str, Callable[[Split, Corpus], Baseline]] = {
    "query": lambda train, corpus: query(),
    "recency_mix": lambda train, corpus: recency_mix(),
    "last_turn_concat": lambda train, corpus: last_turn_concat(),
    "ridge": ridge,
    "ridge_context": ridge_context,
}
_READ_TURNS = ("recency_mix", "ridge_context")
_REGRESSION_INPUTS = {"ridge": 1, "ridge_context": 3}  # embeddings side by side


class Task(NamedTuple):
    """One data folder, encoded.

    Attributes:
        data: Its splits as arrays.
        dataset: Its texts.
        split: Name of the split that is measured.
        encoder: The memory's encoder.
        source: How texts were encoded.
        turns: How many turns a method that reads embeddings sees, the newest ones.
    """

    data: Opened
    dataset: Dataset
    split: str
    encoder: Encoder
    source: DataConfig
    turns: int

    @property
    def examples(self) -> Sequence[Example]:
        """Those that are measured."""
        return self.dataset.splits[self.split]

    def conversations(self, split: str) -> list[str]:
        """The text of each conversation: the query, then the turns, the newest first, a line each."""
        return [self.conversation(example) for example in self.dataset.splits[split]]

    def conversation(self, example: Example) -> str:
        """The text of one conversation."""
        return self.source.query_prefix + "\n".join([example.query, *reversed(example.context)])

    def windowed(self, example: Example) -> Sequence[str]:
        """Its newest turns, as many as are seen, oldest first."""
        return example.context[max(0, len(example.context) - self.turns) :]

    def search(self, vectors: ndarray, split: str, memory: ndarray | None = None) -> ndarray:
        """Rows of the corpus for each query of a split, best first, `[Q, DEPTH]`; `memory` embeds it anew."""
        corpus = self.data.corpus if memory is None else self.data.corpus._replace(embeddings=memory)
        return retrieve(vectors, self.data.splits[split], corpus, DEPTH)[1]


class FineTuning(NamedTuple):
    """How sentence-transformers trains.

    Attributes:
        epochs: Passes over train; the one that is best on dev counts.
        learning_rate: Peak of AdamW, with a cosine after the warm-up.
        batch_size: Rows of a step.
        tokens: Where texts are cut.
        temperature: Divides the cosine similarities.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
    """

    epochs: int = 3
    learning_rate: float = 1.5e-4
    batch_size: int = 32
    tokens: int = TOKENS
    temperature: float = 0.05
    warmup: float = 0.1
    weight_decay: float = 0.01


class Cell(NamedTuple):
    """What one method did with one seed.

    Attributes:
        found: Rows of the corpus for each query, best first, -1 where nothing was left, `[Q, DEPTH]`.
        train_seconds: Training, choosing an epoch and tuning on dev; 0 where there is none of it.
        index_anew: Whether the passages must be encoded again.
        ms: Milliseconds from the texts of one conversation to the vector to search with, median.
        ms_turns_kept: The same where the embeddings of the turns are kept from when they were said.
        mb: Megabytes of weights that a question needs, the encoder's included; None if the encoder is code.
        about: What else is worth keeping.
    """

    found: ndarray
    train_seconds: float
    index_anew: bool
    ms: float | None
    ms_turns_kept: float | None
    mb: float | None
    about: Mapping[str, Any] = {}


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: Its name.
        run: Gives the cell of a seed.
        settings: What its cells depend on besides data and encoder.
        seeded: Whether chance has a part in it.
        ours: Whether it is a predictor of this library.
        lacking: Why it cannot run here, or None.
    """

    name: str
    run: Callable[[int], Cell]
    settings: Mapping[str, Any] = {}
    seeded: bool = False
    ours: bool = False
    lacking: str | None = None


def open_task(config: Config, split: str) -> Task:
    """Encode what the store lacks, and open it.

    Raises:
        ConfigError: If the turns are not those of the data.
        DataError: If the data breaks the contract.
    """
    if config.data.context_from != "data":
        raise ConfigError(
            f"data.context_from is {config.data.context_from!r}; the rivals read the turns of the data itself"
        )
    data = opened(config, None, judged=split)
    assert config.data.path is not None
    dataset = load_dataset(Path(config.data.path), tuple(dict.fromkeys(("train", "dev", split))))
    encoder = load_encoder(config.data.encoder, config.data.encoder_precision)
    return Task(data, dataset, split, encoder, config.data, config.model.max_context_length)


def untrained_methods(task: Task) -> list[Method]:
    """Baselines, the encoder on the conversation's text, and people's rewrites."""
    said = any(example.context for example in task.examples)
    no_turns = None if said else f"no example of {task.split} has turns"
    no_cut = None if isinstance(task.encoder, BertTextEncoder) else "data.encoder is not a model folder"
    rewritten = any("rewrite" in example.extra for example in task.examples)
    return [
        *(
            Method(
                name,
                partial(_baseline, task, name),
                {"turns": task.turns} if name in _READ_TURNS else {},
                lacking=no_turns if name == "last_turn_concat" else None,
            )
            for name in BASELINES
        ),
        *(
            Method(name, partial(_text, task, both), {"tokens": TOKENS}, lacking=no_turns or no_cut)
            for name, both in (("conversation_text", False), ("conversation_text_and_query", True))
        ),
        Method(
            "rewrite",
            partial(_rewrite, task),
            lacking=None if rewritten else f"no example of {task.split} has a 'rewrite'",
        ),
    ]


def milliseconds(answer: Callable[[Example], Any], examples: Sequence[Example]) -> float:
    """Median time of a question by itself. Each is asked once before, so that nothing compiles."""
    taken = []
    for example in examples[:TIMED]:
        answer(example)
    for example in examples[:TIMED]:
        started = time.perf_counter()
        answer(example)
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def _baseline(task: Task, name: str, seed: int) -> Cell:
    """A baseline, tuned on dev. Only its encoding is timed: the rest takes microseconds."""
    data, prefix, started = task.data, task.source.query_prefix, time.perf_counter()
    baseline = BASELINES[name](data.splits["train"], data.corpus)
    settings, _ = tune(baseline, data.splits["dev"], data.corpus)
    tuning = time.perf_counter() - started if len(baseline.grid) > 1 else 0.0
    found = task.search(baseline.prepare(data.judged)(settings), task.split)

    def texts(example: Example) -> list[str]:
        if name == "last_turn_concat":
            return [prefix + " ".join([*example.context[-1:], example.query])]
        turns = task.windowed(example) if name in _READ_TURNS else ()
        return [prefix + text for text in (*turns, example.query)]

    ms = milliseconds(lambda example: task.encoder.encode(texts(example)), task.examples)
    kept = ms
    if name in _READ_TURNS:
        kept = milliseconds(lambda example: task.encoder.encode(texts(example)[-1:]), task.examples)
    inputs, width = _REGRESSION_INPUTS.get(name, 0), task.encoder.dim
    weights = (inputs * width + 1) * width if inputs else 0
    return Cell(found, tuning, False, ms, kept, _megabytes(task.encoder, weights), {"tuned": settings})


def _text(task: Task, with_query: bool, seed: int) -> Cell:
    """The memory's encoder on the conversation's text, alone or averaged with the query's embedding."""
    whole = task.encoder
    assert isinstance(whole, BertTextEncoder)
    encoder = BertTextEncoder(
        whole.source.transformer,
        whole.pooling,
        min(TOKENS, whole.max_length),
        precision=task.source.encoder_precision,
    )
    vectors = encoder.encode(task.conversations(task.split))
    if with_query:
        vectors = unit(vectors + unit(task.data.judged.query))

    def answer(example: Example) -> None:
        encoder.encode([task.conversation(example)])
        if with_query:
            whole.encode([task.source.query_prefix + example.query])

    ms = milliseconds(answer, task.examples)
    about = {"cut": encoder.truncated}
    return Cell(task.search(vectors, task.split), 0.0, False, ms, ms, _megabytes(whole), about)


def _rewrite(task: Task, seed: int) -> Cell:
    """What people made of the query; the query itself where they left it. Their time is not measured."""
    texts = [example.extra.get("rewrite", example.query) for example in task.examples]
    for text, example in zip(texts, task.examples, strict=True):
        if not isinstance(text, str):
            raise DataError(
                f"{task.split}: 'rewrite' of {example.id!r} is a {type(text).__name__}, not a text"
            )
    vectors = task.encoder.encode([task.source.query_prefix + text for text in texts])
    about = {"rewritten": sum("rewrite" in example.extra for example in task.examples)}
    return Cell(task.search(vectors, task.split), 0.0, False, None, None, _megabytes(task.encoder), about)


def ours(task: Task, config: Config, seed: int) -> Cell:
    """Train a predictor and evaluate it, as `prime_jax.train` and `prime_jax.evaluate` do."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    settings, source = config.train, config.data
    assert source.path is not None
    named = source.encoder if names_code(source.encoder) else None
    with tempfile.TemporaryDirectory() as scratch:
        run, report = Path(scratch) / "run", Path(scratch) / "report"
        started = time.perf_counter()
        trained(config, run)
        seconds = time.perf_counter() - started
        store = Path(source.store) if source.store else None
        if settings.x_encoder != "frozen" or settings.y_encoder != "frozen":
            store = Path(scratch) / "embeddings"  # of encoders that go with the run
        evaluate_run(run, Path(source.path), task.split, report, store=store, encoder=named)
        found = _read_ranking(report / f"run.{PREDICTED}.trec", task)
        predictor = load(run, precision="float32", encoder=named)
        encoder = encoder_of(predictor)
        most = predictor.model.config.max_context_length - predictor.takes_one_text

        def turns(example: Example) -> list[str]:
            return list(example.context[max(0, len(example.context) - most) :])

        def from_kept(example: Example) -> None:
            context, asked = embedded[example.id], [source.query_prefix + example.query]
            if predictor.takes_one_text:
                asked.append(source.query_prefix + as_one_text(example.query, example.context))
            vectors = encoder.encode(asked)
            predictor.predict(np.concatenate([context, vectors[1:]]), vectors[0])

        ms = milliseconds(lambda one: predictor.predict_text(turns(one), one.query), task.examples)
        kept = ms
        if isinstance(predictor.model, EmbeddingPredictor):
            embedded = {
                one.id: encoder.encode([source.query_prefix + turn for turn in turns(one)])
                for one in task.examples[:TIMED]
            }
            kept = milliseconds(from_kept, task.examples)
        info, dev = predictor.info(), task.data.splits["dev"]
        memory = predictor.map_memory(task.data.corpus.embeddings)
        on_dev = task.search(predictions(predictor, dev), "dev", memory)
    anew = settings.target != "frozen" or settings.y_encoder != "frozen"
    about = {
        "best_step": info["step"],
        **{name: info[name] for name in ("blend_share",) if name in info},
        "parameters": info["parameters"],
        "dev_MRR@10": float(mean_reciprocal_rank(on_dev[None], dev.positives)[0]),
    }
    size = _megabytes(encoder, info["parameters"])
    if predictor.reads_text:  # it is the encoder of a question
        size = FLOAT32 * info["parameters"] / 1e6
    return Cell(found, seconds, anew, ms, kept, size, about)


def _read_ranking(file: Path, task: Task) -> ndarray:
    """The first `DEPTH` rows of every ranking of a TREC run file."""
    row = {example.id: at for at, example in enumerate(task.examples)}
    passage = {one.id: at for at, one in enumerate(task.dataset.corpus)}
    found = np.full((len(row), DEPTH), -1, np.int64)
    for line in file.read_text(encoding="utf-8").splitlines():
        asked, _, answer, rank, *_ = line.split()
        if int(rank) <= DEPTH:
            found[row[asked], int(rank) - 1] = passage[answer]
    return found


def _megabytes(encoder: Encoder, weights: int = 0) -> float | None:
    """Size of the encoder's weight files and of so many float32 numbers beside them."""
    x = encoder.x if isinstance(encoder, PairedEncoder) else encoder
    if not isinstance(x, BertTextEncoder):
        return None
    size = sum(file.stat().st_size for file in weight_files(x.source.transformer))
    return (size + FLOAT32 * weights) / 1e6
