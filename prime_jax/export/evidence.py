"""What a bundle states about itself, measured on the run's data: lost precision, traces of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from prime_jax.data.grouping import conversation_labels
from prime_jax.data.records import SPLITS
from prime_jax.errors import DataError, ExportError
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.membership import Closeness, closeness, membership
from prime_jax.evaluate.run import (
    OpenedData,
    open_data,
    predictions,
    seen_by,
    split_arrays,
)
from prime_jax.evaluate.significance import compare
from prime_jax.export.interface import Arrays
from prime_jax.export.interfaces import interface_of
from prime_jax.export.optional import need
from prime_jax.predict.predictor import Predictor
from prime_jax.progress import progress
from prime_jax.retrieval.metrics import ranking_metrics
from prime_jax.retrieval.topk import ExactIndex

VALIDATION = "dev"
METRIC = "R@10"
MAX_LOSS = 0.01
SEED = 0
MOST = 2000  # examples of either side of the leak check
_ROWS = 32


@dataclass(frozen=True)
class Evidence:
    """The validation split that precisions are judged on, and the result of the leak check.

    Attributes:
        validation: Queries and right answers.
        corpus: The passages as predictions search them.
        groups: Conversation of each query.
        leak: What `membership` found, or why it was not measured.
        requests: The queries as the model's ONNX file takes them, by name of the input.
    """

    validation: Split
    corpus: Corpus
    groups: Int64[ndarray, " Q"]
    leak: dict[str, Any]
    requests: Arrays

    def judge(self, reference: Path, candidate: Path) -> dict[str, Any]:
        """Compare what two ONNX files find on the validation split.

        Returns:
            `cosine_mean` and `cosine_min` of their predictions, `R@10` of the candidate, `loss`, by how much
            it is below the reference, and its 95% `loss_interval`, resampling conversations.
        """
        right, other = (self._answers(path) for path in (reference, candidate))
        scores = [self._scores(answers) for answers in (right, other)]
        loss = compare(*scores, seed=SEED, groups=self.groups)
        cosine = (right * other).sum(axis=1)
        return {
            "split": VALIDATION,
            "queries": len(right),
            "cosine_mean": float(cosine.mean()),
            "cosine_min": float(cosine.min()),
            METRIC: float(scores[1].mean()),
            "loss": loss.difference,
            "loss_interval": [loss.low, loss.high],
        }

    def _answers(self, path: Path) -> Float32[ndarray, "Q E"]:
        runtime, count = need("onnxruntime", "onnx"), len(self.validation.query)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = []
        with progress(f"Predicting with {path.name}", count, "queries") as advance:
            for start in range(0, count, _ROWS):
                feeds = {name: array[start : start + _ROWS] for name, array in self.requests.items()}
                found.append(session.run(["embedding"], feeds)[0])
                advance(len(found[-1]))
        answers: Float32[ndarray, "Q E"] = np.concatenate(found)
        return answers

    def _scores(self, answers: Float32[ndarray, "Q E"]) -> ndarray:
        if not np.isfinite(answers).all():
            raise ExportError("the predictions hold NaN or Inf in this precision")
        _, found = retrieve(answers, self.validation, self.corpus, 10)
        return ranking_metrics(found, self.validation.positives)[METRIC]


def gather_evidence(predictor: Predictor, run: Path, data: Path, *, store: Path | None = None) -> Evidence:
    """Open the run's data and attack the model on it.

    Args:
        predictor: As `load(run)` gave it.
        run: Its folder.
        data: Data folder; its train split must be what the run was trained on for the leak check to mean it.
        store: Embedding store; None means the run's, or `embeddings/` in the data folder.

    Raises:
        ConfigError, DataError: As `open_data`.
    """
    names = [name for name in SPLITS if (data / f"{name}.jsonl").is_file()]
    for name in ("train", VALIDATION):
        if name not in names:
            raise DataError(f"{data / f'{name}.jsonl'}: the file is missing")
    opened = open_data(predictor, run, data, names, store=store)
    turns = not (predictor.config and predictor.config.steered)
    splits = split_arrays(
        opened.dataset,
        opened.embedded,
        opened.encoder,
        opened.source,
        joined_texts=turns,
        one_text=predictor.takes_one_text,
    )
    passages = opened.embedded.corpus()
    memory = passages if predictor.target_head is None else predictor.map_memory(passages)
    scope = opened.embedded.corpus_scope
    interface = interface_of(predictor.model.config)
    return Evidence(
        validation=splits[VALIDATION],
        corpus=Corpus(memory, scope, ExactIndex(memory, scope)),
        groups=conversation_labels(opened.dataset.splits[VALIDATION]),
        leak=_leak(predictor, opened, splits, passages, memory),
        requests=interface.requests(
            seen_by(predictor, splits[VALIDATION]), Path(predictor.info()["source"]), predictor.query_prefix
        ),
    )


def _leak(
    predictor: Predictor,
    opened: OpenedData,
    splits: dict[str, Split],
    passages: Float32[ndarray, "M E"],
    memory: Float32[ndarray, "M E"],
) -> dict[str, Any]:
    held_out = "test" if "test" in splits else VALIDATION
    trained_on = {name: opened.dataset.splits[name] for name in ("train", VALIDATION)}
    trained_hash = type(opened.dataset)(opened.dataset.corpus, trained_on).hash
    if trained_hash != predictor.info().get("data_hash"):
        return {"measured": False, "why": "the data is not what the model was trained on"}
    sides = []
    for name in ("train", held_out):
        split = splits[name]
        labels = conversation_labels(opened.dataset.splits[name])
        rows = _sample(labels)
        predicted = predictions(predictor, _rows_of(split, rows))
        right = [split.positives[row] for row in rows]
        to_prediction, to_query = closeness(predicted, memory, right), None
        if split.query.shape[1] == passages.shape[1]:
            to_query = closeness(split.query[rows], passages, right)
        sides.append(Closeness(to_prediction, to_query, labels[rows]))
    if min(len(np.unique(side.conversation)) for side in sides) < 10:
        return {"measured": False, "why": "fewer than ten conversations on one side"}
    return {"measured": True, "held_out": held_out, **membership(*sides, seed=SEED)}


def _rows_of(split: Split, rows: Int64[ndarray, " m"]) -> Split:
    """Some queries of a split, and what is known before anything is searched."""
    right = [split.positives[row] for row in rows]
    arrays = split.query[rows], split.context[rows], split.mask[rows]
    contexts, queries = split.context_texts, split.query_texts
    return Split(
        *arrays,
        right,
        context_texts=None if contexts is None else [contexts[row] for row in rows],
        query_texts=None if queries is None else [queries[row] for row in rows],
        conversation=None if split.conversation is None else split.conversation[rows],
    )


def _sample(labels: Int64[ndarray, " n"]) -> Int64[ndarray, " m"]:
    """Rows of whole conversations drawn at random, about `MOST` of them, in order."""
    order = np.random.default_rng(SEED).permutation(np.unique(labels))
    sizes: Sequence[int] = np.bincount(labels)[order]
    taken = order[: max(1, int(np.searchsorted(np.cumsum(sizes), MOST, side="right")))]
    return np.flatnonzero(np.isin(labels, taken))
