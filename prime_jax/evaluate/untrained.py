"""What can be had without training a model, compared on dev: which door to take on the first day.

Every candidate is a model in the end (`model_of`), so that the best one is exported and served like any.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from numpy import ndarray

from prime_jax.config import DataConfig
from prime_jax.data.encode import load_encoder
from prime_jax.data.grouping import conversation_labels
from prime_jax.errors import DataError
from prime_jax.evaluate import UNTRAINED
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.baselines import Baseline, Settings, mean_context, query, recency_mix, tune
from prime_jax.evaluate.linear import linear_weights, ridge, ridge_context
from prime_jax.evaluate.run import OpenedData, embed, split_arrays
from prime_jax.evaluate.significance import interval
from prime_jax.models import Model, adapter
from prime_jax.models.adapter import read_facts
from prime_jax.models.mix import MixConfig, mix_of
from prime_jax.predict.adapter import load_adapter
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.untrained import untrained
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.progress import progress
from prime_jax.retrieval.metrics import DEPTH, ranking_metrics
from prime_jax.retrieval.vectors import unit

TEXT = "text"
GENERAL = "general"
SHOWN = ("P@5", "MRR@10")
_QUERY_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
_SHARES = (0.25, 0.5, 0.75, 1.0)


class Candidate(NamedTuple):
    """One way to search, with the settings that are best on dev.

    Attributes:
        name: One of `UNTRAINED`.
        settings: The best of its grid.
        figures: Mean of each of `SHOWN` on dev.
        interval: 95% interval of MRR@10, over whole conversations.
        found: Corpus rows found for each query of dev, `[Q, DEPTH]`.
    """

    name: str
    settings: Settings
    figures: dict[str, float]
    interval: tuple[float, float]
    found: ndarray


class Comparison(NamedTuple):
    """All candidates on one data folder.

    Attributes:
        candidates: In the order of `UNTRAINED`.
        data: What they were compared on.
        splits: Dev as arrays, and train where a candidate is fitted to it.
        max_turns: Most turns that are looked at.
        impossible: Why a candidate that was asked for is not there, by its name.
    """

    candidates: Sequence[Candidate]
    data: OpenedData
    splits: dict[str, Split]
    max_turns: int
    impossible: dict[str, str]

    @property
    def best(self) -> Candidate:
        """The one with the largest MRR@10 on dev, the simplest of equally good ones."""
        return max(self.candidates, key=lambda one: round(one.figures["MRR@10"], 12))

    def named(self, name: str) -> Candidate:
        """The candidate of that name.

        Raises:
            DataError: If it was not compared.
        """
        for one in self.candidates:
            if one.name == name:
                return one
        raise DataError(f"{name}: {self.impossible.get(name, 'was not asked for')}")


def compare_untrained(
    source: DataConfig,
    *,
    max_turns: int = 10,
    only: Sequence[str] = UNTRAINED,
) -> Comparison:
    """Tune every candidate on dev.

    Args:
        source: Data folder, encoder, prefixes and embedding store.
        max_turns: Most turns that are looked at.
        only: Names of the candidates.

    Raises:
        ConfigError: If there is no such encoder.
        DataError: If the data breaks the contract, or a candidate is unknown, or none of `only` is possible.
    """
    for name in only:
        if name not in UNTRAINED:
            raise DataError(f"{name}: there is no such baseline to export; there are {', '.join(UNTRAINED)}")
    assert source.path is not None
    encoder = load_encoder(source.encoder, source.encoder_precision)
    store = None if source.store is None else Path(source.store)
    folder = Path(source.path)
    fitted = any(name.startswith("ridge") for name in only) and (folder / "train.jsonl").is_file()
    needed = ("train", "dev") if fitted else ("dev",)
    data = embed(folder, needed, encoder, source, store=store, max_turns=max_turns)
    splits = split_arrays(data.dataset, data.embedded, encoder, source, joined_texts=False)
    corpus = Corpus(data.embedded.corpus(), data.embedded.corpus_scope)
    makers: dict[str, Callable[[], Baseline]] = {
        "query": query,
        "mean_context": mean_context,
        "recency_mix": recency_mix,
        "ridge": lambda: ridge(splits["train"], corpus),
        "ridge_context": lambda: ridge_context(splits["train"], corpus),
    }
    impossible: dict[str, str] = {}
    if isinstance(encoder, BertTextEncoder) and source.context_from == "data":
        makers[TEXT] = lambda: _text(encoder, source, max_turns)
        makers[GENERAL] = lambda: _general(encoder, max_turns)
    else:
        why = "the encoder's weights are not at hand, or turns are not those of the data"
        impossible |= dict.fromkeys((TEXT, GENERAL), why)
    if GENERAL in only and GENERAL not in impossible:
        facts = read_facts(adapter.GENERAL)
        if encoder.identity != facts["encoder"]:
            impossible[GENERAL] = f"it belongs to another encoder than {encoder.identity}"
        elif source.query_prefix != facts["query_prefix"]:
            impossible[GENERAL] = f"it was trained with the query prefix {facts['query_prefix']!r}"
    if not fitted:
        impossible |= dict.fromkeys(("ridge", "ridge_context"), "the data has no train.jsonl to fit it to")
    if not splits["dev"].mask.any():  # these are the query then, or what a map makes of it
        no_turns = ("mean_context", "recency_mix", TEXT, "ridge_context")  # general maps the query, too
        impossible |= dict.fromkeys(no_turns, "dev has no turns")
    impossible = {name: why for name, why in impossible.items() if name in only}
    wanted = [name for name in UNTRAINED if name in only and name not in impossible]
    if not wanted:
        raise DataError("; ".join(f"{name}: not possible, {why}" for name, why in impossible.items()))
    dev, groups = splits["dev"], conversation_labels(data.dataset.splits["dev"])
    found = []
    with progress("Comparing on dev", len(wanted), "candidates") as advance:
        for name in wanted:
            baseline = makers[name]()
            settings, _ = tune(baseline, dev, corpus)
            rows = retrieve(baseline.prepare(dev)(settings), dev, corpus, DEPTH)[1]
            figures = ranking_metrics(rows, dev.positives)
            means = {metric: float(figures[metric].mean()) for metric in SHOWN}
            ends = interval(figures["MRR@10"], seed=0, groups=groups)
            found.append(Candidate(name, settings, means, (float(ends[0]), float(ends[1])), rows))
            advance(1, name)
    return Comparison(found, data, splits, max_turns, impossible)


def model_of(candidate: Candidate, compared: Comparison) -> tuple[Model, Path | None, dict[str, Any]]:
    """A candidate as a model, the folder that its tokenizer lies in where it reads text, and facts of it.

    The facts are whether it was `trained`, and the `licence` and `attribution` of what it was trained on.
    """
    data, settings = compared.data, candidate.settings
    if candidate.name in (TEXT, GENERAL):
        weight, turns = float(settings["query_weight"]), compared.max_turns
        if candidate.name == TEXT:
            predictor = untrained(encoder=data.encoder, max_turns=turns, weight=weight)
        else:
            share = float(settings["share"])
            predictor = load_adapter(
                adapter.GENERAL, data.encoder, query_weight=weight, max_turns=turns, share=share
            )
        info = predictor.info()
        facts: dict[str, Any] = {name: info[name] for name in ("licence", "attribution") if name in info}
        return predictor.model, Path(info["source"]), facts | {"trained": candidate.name == GENERAL}
    shape: dict[str, Any] = {
        "input_dim": data.encoder.dim,
        "output_dim": data.encoder.dim,
        "max_context_length": compared.max_turns,
    }
    weight = float(settings.get("weight", 0.0))
    if candidate.name == "mean_context":
        return mix_of(MixConfig(**shape, average=True), weight, 1.0), None, {"trained": False}
    if not candidate.name.startswith("ridge"):
        return mix_of(MixConfig(**shape), weight, float(settings.get("decay", 0.0))), None, {"trained": False}
    corpus = Corpus(data.embedded.corpus(), data.embedded.corpus_scope)
    kernel, bias = linear_weights(candidate.name, settings, compared.splits["train"], corpus)
    shape |= {"linear": "query" if candidate.name == "ridge" else "context"}
    model = mix_of(MixConfig(**shape, keep_query=bool(settings["residual"])), 0.0, 0.0)
    model.linear_map.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    model.linear_map.bias.set_value(jnp.asarray(bias, jnp.float32))
    return model, None, {"trained": True}


def _text(encoder: BertTextEncoder, source: DataConfig, max_turns: int) -> Baseline:
    """The encoder's embedding of query and turns read as one text, plus a weight times the query's."""
    reader = untrained(encoder=encoder, weight=0.0, max_turns=max_turns, query_prefix=source.query_prefix)

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        whole, alone = _read(reader, split)
        return lambda settings: unit(whole + settings["query_weight"] * alone)

    return Baseline(TEXT, [{"query_weight": weight} for weight in _QUERY_WEIGHTS], prepare)


def _general(encoder: BertTextEncoder, max_turns: int) -> Baseline:
    """The same by the predictor of the package, with a share of what it learned."""

    def prepare(split: Split) -> Callable[[Settings], ndarray]:
        @cache
        def read(share: float) -> tuple[ndarray, ndarray]:
            reader = load_adapter(
                adapter.GENERAL, encoder, query_weight=0.0, max_turns=max_turns, share=share
            )
            return _read(reader, split)

        def vectors(settings: Settings) -> ndarray:
            whole, alone = read(settings["share"])
            return unit(whole + settings["query_weight"] * alone)

        return vectors

    grid = [{"share": share, "query_weight": weight} for share in _SHARES for weight in _QUERY_WEIGHTS]
    return Baseline(GENERAL, grid, prepare)


def _read(reader: Predictor, split: Split) -> tuple[ndarray, ndarray]:
    """Query and turns as one text, and the query alone."""
    assert split.context_texts is not None
    assert split.query_texts is not None
    whole = reader.predict_text(split.context_texts, split.query_texts)
    return whole, reader.predict_text([[]] * len(split.query_texts), split.query_texts)
