"""What does the prediction owe to its parts? The trained model with one of them taken away."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy import ndarray

from prime_jax.evaluate.arrays import Split
from prime_jax.models.prime import EmbeddingPredictor
from prime_jax.predict.predictor import Predictor

_Part = Callable[[Predictor, Split], ndarray]


def ablated(predictor: Predictor, test: Split, seed: int) -> Mapping[str, ndarray]:
    """Predictions `[Q, E]` for a split, by what was taken away.

    `no context`: without turns; `other context`: with the turns of a random other query; `no query`: a zero
    vector in its place; `no residual`: what the network adds, alone (only for models with a residual);
    `no linear map` (only where there is one). A part that is taken away from a trained model costs at least
    as much as it would cost a model that was trained without it.

    Args:
        predictor: The trained model.
        test: The split.
        seed: Of who gets whose turns.
    """
    others = _derangement(len(test.query), seed)
    if predictor.reads_text:
        return _without_words(predictor, test, others)
    nothing = np.zeros_like(test.mask)
    found = {
        "no context": predictor.predict(test.context, test.query, nothing),
        "other context": predictor.predict(test.context[others], test.query, test.mask[others]),
        "no query": predictor.predict(test.context, np.zeros_like(test.query), test.mask, zero_query=True),
    }
    model = predictor.model
    rest = {}
    if isinstance(model, EmbeddingPredictor) and model.config.residual != "none":
        rest["no residual"] = without_residual(model)
    if isinstance(model, EmbeddingPredictor) and model.config.residual == "linear":
        rest["no linear map"] = _reduced(model, {"residual": "copy"}, drop=("linear_map",))
    for name, what_is_left in rest.items():
        alone = Predictor.from_model(what_is_left, precision="float32")
        found[name] = alone.predict(test.context, test.query, test.mask)
    return found


def _without_words(predictor: Predictor, test: Split, others: ndarray) -> Mapping[str, ndarray]:
    """The same of a model that reads text: without turns, with those of another query, without the query."""
    assert test.context_texts is not None
    assert test.query_texts is not None
    turns, queries = test.context_texts, list(test.query_texts)
    return {
        "no context": predictor.predict_text([[] for _ in turns], queries),
        "other context": predictor.predict_text([turns[other] for other in others], queries),
        "no query": predictor.predict_text(turns, [""] * len(queries)),
    }


def without_residual(model: EmbeddingPredictor) -> EmbeddingPredictor:
    """The model that answers with what its layers add to the residual, and nothing else."""
    bare = _reduced(
        model,
        {"residual": "none", "max_delta": None},
        drop=("residual_gate", "copy_age", "copy_content", "linear_map"),
    )
    # The answer is scaled to length 1, so of the gate only its sign is left.
    sign = jnp.where(model.residual_gate[...] < 0, -1.0, 1.0)
    for param in (bare.output_proj.kernel, bare.output_proj.bias):
        param.set_value(sign * param[...])
    return bare


def _reduced(
    model: EmbeddingPredictor, changes: Mapping[str, object], *, drop: tuple[str, ...]
) -> EmbeddingPredictor:
    """A model of a smaller config with the same weights, less some."""
    config = model.config.model_copy(update={**changes, "use_torch_compile": False})
    bare = config.build(rngs=nnx.Rngs(0))
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = nnx.state(bare, nnx.Param)
    nnx.replace_by_pure_dict(state, {name: part for name, part in weights.items() if name not in drop})
    nnx.update(bare, state)
    return bare


def _derangement(count: int, seed: int) -> ndarray:
    """A random order in which nothing stands where it stood (for two or more)."""
    order = np.random.default_rng(seed).permutation(count)
    places = np.empty(count, np.int64)
    places[order] = np.roll(order, 1)
    return places
