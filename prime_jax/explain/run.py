"""From a trained run and a data folder to explanations of its questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from prime_jax.data.encode import Encoder, encode_texts
from prime_jax.data.steered import LEAKY, ZERO
from prime_jax.errors import ConfigError
from prime_jax.evaluate.run import OpenedData, open_data
from prime_jax.evaluate.steering import open_steering_of
from prime_jax.explain.explainer import Explainer
from prime_jax.explain.explanation import Explanation
from prime_jax.explain.known import KnownPairs
from prime_jax.explain.page import page
from prime_jax.files import write_json, write_text
from prime_jax.locks import exclusive
from prime_jax.models.subspace import DecomposedJasperPredictor
from prime_jax.predict.predictor import Predictor, load
from prime_jax.retrieval.vectors import unit

USUAL = 2000  # known questions that say what is usual

Vectors = Float32[np.ndarray, "n D"]


def explain_run(
    run: Path,
    data: Path,
    *,
    questions: Sequence[str] | None = None,
    split: str = "dev",
    count: int = 20,
    steering: str | None = None,
    steer_towards: str | None = None,
    out: Path | None = None,
    encoder: Encoder | str | None = None,
) -> list[Explanation]:
    """Explain predictions of a run, and write them as a page and as JSON.

    Args:
        run: Run folder of a steered model, or one checkpoint of it.
        data: Its data folder, with steering.
        questions: Texts to explain; None explains examples of `split`.
        split: Which examples.
        count: How many of them.
        steering: Variant of the examples' steering; None means that of training. New questions have none but
            what `steer_towards` says.
        steer_towards: Steer every question towards this text.
        out: Where explanations.html and explanations.json are written; None writes nothing.
        encoder: Embeds texts (`prime_jax.load`); needed where the run's encoder is code.

    Raises:
        ConfigError: If the run's model takes no steering, or there is nothing to explain.
        DataError: If the data or its steering is not as it should be.
    """
    predictor = load(run, precision="float32", encoder=encoder)
    if predictor.config is None or not predictor.config.steered:
        raise ConfigError(
            f"{run}: only runs of a steered model (model.kind jasper or subspace) are explained"
        )
    _check_options(questions, steering, steer_towards, count)
    variant = ZERO if questions or steer_towards else steering or predictor.config.steering.judge_with
    wanted = tuple(dict.fromkeys(("train", "dev", split)))
    opened = open_data(predictor, run, data, wanted, steering=variant)
    explainer = explainer_of(predictor, run, data, opened)

    def steered(asked: Vectors, given: Vectors) -> Vectors:
        """What is explained, and what it is compared with, are steered alike."""
        if steer_towards is None:
            return given
        return unit(_encoded([opened.source.query_prefix + steer_towards], opened) - asked)

    if questions:
        texts = list(questions)
        asked = _encoded([opened.source.query_prefix + text for text in texts], opened)
        given = np.zeros_like(asked)
    else:
        texts = [example.query for example in opened.dataset.splits[split][:count]]
        asked, given = (vectors[:count] for vectors in _vectors(opened, split))
    usual_questions, usual_steering = (vectors[:USUAL] for vectors in _vectors(opened, "dev"))
    explainer.usual = explainer.usual_of(usual_questions, steered(usual_questions, usual_steering))
    found = explainer.explain_batch(asked, steered(asked, given), texts=texts)
    if out is not None:
        told = f"towards “{steer_towards}”" if steer_towards else "nowhere" if variant == ZERO else variant
        if variant in LEAKY:
            told += ", which is made from the right answers"
        note = (
            f"{run.name}: {predictor.config.model.kind} model, steered: {told}. What is usual was measured "
            f"on {len(usual_questions):,} questions of dev, steered in the same way."
        )
        with exclusive(out, "explanations", lock=out / ".explanations.lock"):
            written = page(found, title=f"{len(found)} explained predictions", note=note)
            write_text(out / "explanations.html", written)
            write_json(out / "explanations.json", [explanation.to_json() for explanation in found])
    return found


def explainer_of(predictor: Predictor, run: Path, data: Path, opened: OpenedData) -> Explainer:
    """The explainer of a run, which knows the pairs of its training data.

    A model with a router brings its own centroids and their names; another one's lie with the data.
    """
    embedded, info = opened.embedded, predictor.info()
    if isinstance(predictor.model, DecomposedJasperPredictor):
        centroids, names = np.asarray(predictor.model.centroids[...]), info["subspaces"]
    else:
        steering = open_steering_of(predictor, run, data, embedded, opened.encoder.identity)
        centroids, names = steering.centroids, steering.names
    train, examples = embedded.splits["train"], opened.dataset.splits["train"]
    first = np.array([ids[0] for ids in train.positives])
    texts = {passage.id: passage.text for passage in opened.dataset.corpus}
    known = KnownPairs(
        embedded.store[train.query_rows],
        embedded.store[embedded.corpus_rows[first]],
        [example.query for example in examples],
        [texts[example.positives[0]] for example in examples],
        [example.positives[0] for example in examples],
    )
    model: Any = predictor.model  # a steered one
    return Explainer(model, centroids, names, known=known)


def _check_options(
    questions: Sequence[str] | None, steering: str | None, steer_towards: str | None, count: int
) -> None:
    if count < 1:
        raise ConfigError(f"--count {count} leaves nothing to explain")
    if steering is not None and (questions or steer_towards is not None):
        raise ConfigError("--steering is for examples of the data; leave it out with --question and --steer")
    for text in (*(questions or ()), *([] if steer_towards is None else [steer_towards])):
        if not text.strip():
            raise ConfigError("a text given with --question or --steer is empty")


def _vectors(opened: OpenedData, split: str) -> tuple[Vectors, Vectors]:
    """Questions of a split and their steering, zero where there is none, `[n, D]` each."""
    context, _, query = opened.embedded.splits[split].arrays(opened.embedded.store)
    return query, context[:, 0]


def _encoded(texts: list[str], opened: OpenedData) -> Float32[np.ndarray, "n D"]:
    encode_texts(texts, opened.encoder, opened.embedded.store)
    return opened.embedded.store[opened.embedded.store.rows(texts)]
