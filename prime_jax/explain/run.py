"""From a trained run and a data folder to explanations of its questions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from prime_jax.data.encode import encode_texts
from prime_jax.errors import ConfigError
from prime_jax.evaluate.run import OpenedData, open_data
from prime_jax.explain.explainer import Explainer
from prime_jax.explain.explanation import Explanation
from prime_jax.explain.known import KnownPairs
from prime_jax.explain.page import page
from prime_jax.files import write_json, write_text
from prime_jax.predict.predictor import Predictor, load
from prime_jax.retrieval.vectors import unit

USUAL = 2000  # known questions that say what is usual


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

    Raises:
        ConfigError: If the run's model takes no steering, or there is nothing to explain.
        DataError: If the data or its steering is not as it should be.
    """
    predictor = load(run, precision="float32")
    if predictor.config is None or not predictor.config.steered:
        raise ConfigError(
            f"{run}: only runs of a steered model (model.kind jasper or subspace) are explained"
        )
    if count < 1:
        raise ConfigError(f"--count {count} leaves nothing to explain")
    wanted = ["train"] if questions else list(dict.fromkeys(["train", split]))
    variant = steering or predictor.config.steering.judge_with
    opened = open_data(predictor, run, data, wanted, steering=variant)
    assert opened.steering is not None
    explainer = explainer_of(predictor, opened)
    if questions:
        texts = list(questions)
        prefix = opened.source.query_prefix
        asked = _encoded([prefix + text for text in texts], opened)
        steers = np.zeros_like(asked)
    else:
        part = opened.embedded.splits[split]
        texts = [example.query for example in opened.dataset.splits[split][:count]]
        context, _, query = part.arrays(opened.embedded.store)
        asked, steers = query[:count], context[:count, 0]
    if steer_towards is not None:
        towards = _encoded([opened.source.query_prefix + steer_towards], opened)
        steers = unit(towards - asked)
    found = explainer.explain_batch(asked, steers, texts=texts)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        told = (
            f"towards “{steer_towards}”"
            if steer_towards
            else f"by “{variant}”"
            if not questions
            else "nowhere"
        )
        title = f"{len(found)} explained predictions"
        note = f"{run.name}: {predictor.config.model.kind} model, steered {told}."
        write_text(out / "explanations.html", page(found, title=title, note=note))
        write_json(out / "explanations.json", [explanation.to_json() for explanation in found])
    return found


def explainer_of(predictor: Predictor, opened: OpenedData) -> Explainer:
    """The explainer of a run, which knows the pairs of its training data and what is usual there."""
    assert opened.steering is not None
    data, steering = opened.embedded, opened.steering
    train, examples = data.splits["train"], opened.dataset.splits["train"]
    context, _, query = train.arrays(data.store)
    first = np.array([ids[0] for ids in train.positives])
    texts = {passage.id: passage.text for passage in opened.dataset.corpus}
    known = KnownPairs(
        query,
        data.store[data.corpus_rows[first]],
        [example.query for example in examples],
        [texts[example.positives[0]] for example in examples],
        [example.positives[0] for example in examples],
    )
    explainer = Explainer(predictor.model, steering.centroids, steering.names, known=known)
    few = np.sort(np.random.default_rng(0).permutation(len(query))[:USUAL])
    explainer.usual = explainer.usual_of(query[few], context[few, 0])
    return explainer


def _encoded(texts: list[str], opened: OpenedData) -> Float32[np.ndarray, "n D"]:
    encode_texts(texts, opened.encoder, opened.embedded.store)
    return opened.embedded.store[opened.embedded.store.rows(texts)]
