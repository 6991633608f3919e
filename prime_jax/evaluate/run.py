"""From a trained run and a data folder to a written report."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from prime_jax.config import DataConfig
from prime_jax.data.conversations import context_texts
from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.encode import Encoder, encode_texts, passage_prefix_for
from prime_jax.data.grouping import conversation_labels
from prime_jax.data.one_text import as_one_text
from prime_jax.data.prepare import prepare
from prime_jax.data.records import Dataset, Example
from prime_jax.data.store import holds_store
from prime_jax.errors import ConfigError, DataError
from prime_jax.evaluate.ablation import ablated
from prime_jax.evaluate.advice import advice, better_baseline
from prime_jax.evaluate.arrays import Corpus, Split
from prime_jax.evaluate.evaluation import evaluate_methods
from prime_jax.evaluate.reliability import Judged
from prime_jax.evaluate.report import Texts, write_report
from prime_jax.evaluate.steering import check_not_steered, steer, steering_facts
from prime_jax.locks import exclusive
from prime_jax.predict.inputs import Request
from prime_jax.predict.predictor import Predictor, load
from prime_jax.predict.text import encoder_of
from prime_jax.retrieval.indexes import IndexKind, open_index
from prime_jax.retrieval.topk import Rows

_PACKAGES = ("prime-jax", "jax", "flax", "numpy", "scipy", "ir-measures")
_TUNING = ("train", "dev")


def evaluate_run(
    run: Path,
    data: Path,
    split: str,
    out: Path,
    *,
    store: Path | None = None,
    seed: int = 0,
    ablation: bool = False,
    index: IndexKind = "exact",
    steering: str | None = None,
    encoder: Encoder | str | None = None,
) -> dict[str, Any]:
    """Measure a run on a split beside tuned baselines, write the report and return what report.json holds.

    Args:
        run: Run folder, or one checkpoint of it.
        data: Data folder in the JSONL contract; its train and dev fit and tune the baselines.
        split: The split to measure on.
        out: Where the report is written.
        store: Embedding store; None means the run's where it is there, or `embeddings/` in the data folder.
        seed: Seed of the bootstrap and the permutation test.
        ablation: Measure the model with parts of it taken away, too.
        index: What searches (`prime_jax.retrieval.indexes`); all but `exact` need the extra `search`.
        steering: Of a steered model: the variant to measure with; None means that of its training.
        encoder: Embeds texts (`prime_jax.load`); needed where the run's encoder is code.

    Raises:
        CheckpointError: If the run is missing or damaged.
        ConfigError: If it carries no configuration to encode texts by, names an encoder that is code and that
            `encoder` does not name, or another evaluation writes to `out`.
        DataError: If the data breaks the contract, or the run was trained on another encoder's embeddings.
    """
    with ExitStack() as opened:
        opened.enter_context(exclusive(out, "a report", lock=out / ".report.lock"))

        def searchable(embeddings: Rows) -> Corpus:
            return Corpus(embeddings, scope, opened.enter_context(open_index(index, embeddings, scope)))

        predictor = load(run, precision="float32", encoder=encoder)  # nothing depends on a timing
        wanted = tuple(dict.fromkeys((*_TUNING, split)))
        dataset, embedded, used, source = open_data(
            predictor, run, data, wanted, store=store, steering=steering
        )
        turns = not (predictor.config and predictor.config.steered)
        one_text = predictor.takes_one_text
        splits = split_arrays(dataset, embedded, used, source, joined_texts=turns, one_text=one_text)
        test, passages, scope = splits[split], embedded.corpus(), embedded.corpus_scope
        predicted = predictions(predictor, test)
        evaluation = evaluate_methods(
            split,
            test,
            predicted,
            train=splits["train"],
            dev=splits["dev"],
            corpus=searchable(passages),
            memory=None if predictor.target_head is None else searchable(predictor.map_memory(passages)),
            seed=seed,
            groups=conversation_labels(dataset.splits[split]),
            judged=_judged(predictor, test, predicted),
            ablated=ablated(predictor, seen_by(predictor, test), seed) if ablation else None,
        )
        scores = {name: method.mean("MRR@10") for name, method in evaluation.methods.items()}
        advised = (
            advice(predictor.config, used, len(dataset.splits["train"])),
            better_baseline(scores, data, predictor.config),
        )
        facts = {
            "index": index,
            "advice": " ".join(filter(None, advised)),
            **steering_facts(predictor, steering),
            **_facts(predictor.info(), dataset, embedded, used),
        }
        return write_report(out, evaluation, _texts(dataset, split), facts)


def seen_by(predictor: Predictor, split: Split) -> Split:
    """A split with the turns as the model takes them: baselines see turns alone.

    Where it has `model.conversation_input`, query and turns as one text are behind the newest turn, and the
    oldest one goes where there are N.
    """
    if not predictor.takes_one_text:
        return split
    assert split.conversation is not None
    told, most = split.mask.sum(axis=1), split.mask.shape[1]
    rows, full = np.arange(len(told)), told == most
    context, mask = split.context.copy(), split.mask.copy()
    context[full] = np.roll(context[full], -1, axis=1)
    place = np.where(full, most - 1, told)
    context[rows, place], mask[rows, place] = split.conversation, True
    return split._replace(context=context, mask=mask)


def predictions(predictor: Predictor, split: Split) -> np.ndarray:
    """Predictions `[Q, E]` for a split, from its texts where the model reads them, or from its embeddings."""
    if not predictor.reads_text:
        seen = seen_by(predictor, split)
        return predictor.predict(seen.context, seen.query, seen.mask)
    assert split.context_texts is not None
    assert split.query_texts is not None
    return predictor.predict_text(split.context_texts, split.query_texts)


def _judged(predictor: Predictor, test: Split, predicted: np.ndarray) -> Judged | None:
    """What the predictor says of its predictions; None where it carries no calibration."""
    if predictor.confidence is None:
        return None
    guard, seen = test.query.shape[1] == predicted.shape[1], seen_by(predictor, test)
    request = Request(seen.context, seen.query, seen.mask, single=False)
    found = predictor.judge(request, predicted, guard=guard)
    assert found.confidence is not None
    guarded = found.embedding if guard else None
    return Judged(found.confidence, guarded, found.trust, str(predictor.confidence.fallback_mix))


class OpenedData(NamedTuple):
    """Data that a predictor can be measured on: its texts, their embeddings, and where these come from."""

    dataset: Dataset
    embedded: EmbeddedDataset
    encoder: Encoder
    source: DataConfig


def open_data(
    predictor: Predictor,
    run: Path,
    data: Path,
    splits: Sequence[str],
    *,
    store: Path | None = None,
    steering: str | None = None,
) -> OpenedData:
    """Embed splits of a data folder as the run's own data was; only what its store lacks is encoded.

    Args:
        predictor: As `load(run)` gave it.
        run: For messages.
        data: Data folder in the JSONL contract.
        splits: Which splits to open.
        store: Embedding store; None means the run's where it is there, or `embeddings/` in the data folder.
        steering: Of a steered model: the variant that takes the place of the turns.

    Raises:
        ConfigError: If the predictor carries no configuration to encode texts by, or takes no steering.
        DataError: If the data breaks the contract, or the run was trained on another encoder's embeddings.
    """
    if predictor.config is None:
        raise ConfigError(f"{run}: does not say which encoder it was trained with; evaluate a run folder")
    source, info = predictor.config.data, predictor.info()
    encoder = encoder_of(predictor)
    if info.get("encoder") != encoder.identity:
        raise DataError(
            f"{run}: was trained on embeddings of {info.get('encoder')}, but data.encoder {source.encoder!r} "
            f"is {encoder.identity}; vectors of different encoders cannot be compared"
        )
    folder = store
    # What only a run's configuration names is used where it is such a store, never made.
    if folder is None and source.store:
        there = holds_store(Path(source.store), encoder.identity, info.get("encoder_start"))
        folder = Path(source.store) if there else None
    most = predictor.config.model.max_context_length
    opened = embed(data, splits, encoder, source, store=folder, max_turns=most)
    if predictor.config.steered:
        embedded = steer(predictor, run, data, opened.embedded, encoder.identity, steering)
        return opened._replace(embedded=embedded)
    check_not_steered(steering, run)
    return opened


def embed(
    data: Path,
    splits: Sequence[str],
    encoder: Encoder,
    source: DataConfig,
    *,
    store: Path | None,
    max_turns: int,
) -> OpenedData:
    """Load splits of a data folder, and encode what a store lacks.

    Args:
        data: Data folder in the JSONL contract.
        splits: Which splits to open.
        encoder: Embeds the texts.
        source: How: prefixes, and where turns come from.
        store: Embedding store; None means `embeddings/` in the data folder.
        max_turns: Most turns of an example; the newest are kept.

    Raises:
        DataError: If the data breaks the contract.
    """
    passage_prefix = passage_prefix_for(encoder, source.passage_prefix)
    prefixes: dict[str, Any] = {"query_prefix": source.query_prefix, "passage_prefix": passage_prefix}
    dataset, embeddings = prepare(data, splits, encoder, store_folder=store, **prefixes)
    embedded = embed_dataset(
        dataset,
        embeddings,
        max_context_length=max_turns,
        context_from=source.context_from,
        first_pass_k=source.first_pass_k,
        **prefixes,
    )
    return OpenedData(dataset, embedded, encoder, source)


def split_arrays(
    dataset: Dataset,
    embedded: EmbeddedDataset,
    encoder: Encoder,
    source: DataConfig,
    *,
    joined_texts: bool = True,
    one_text: bool = False,
) -> dict[str, Split]:
    """Every split as arrays. Texts of several turns are encoded where the data itself has turns.

    Args:
        dataset: The texts.
        embedded: Their embeddings.
        encoder: Encodes what is missing.
        source: How they were encoded.
        joined_texts: Whether to encode the texts of several turns that baselines search with; where a
            steering vector stands in the place of turns there are none.
        one_text: Whether the model takes query and turns as one text, so that every split needs it.
    """
    said = (example.context for examples in dataset.splits.values() for example in examples)
    has_turns = joined_texts and any(said)
    arrays = {}
    for name, part in embedded.splits.items():
        context, mask, query = part.arrays(embedded.store)
        contexts, queries = (
            context_texts(dataset, embedded, name),
            [one.query for one in dataset.splits[name]],
        )

        def encoded(texts: Sequence[str]) -> np.ndarray:
            prefixed = [source.query_prefix + text for text in texts]
            encode_texts(prefixed, encoder, embedded.store)
            return embedded.store[embedded.store.rows(prefixed)]

        last_turn = conversation = None
        fitted_to = has_turns and name != "train"  # no baseline is fitted to those of train
        if fitted_to:
            last_turn = encoded([_with_last_turn(example) for example in dataset.splits[name]])
        if fitted_to or one_text:
            most = mask.shape[1] - one_text
            newest = (turns[max(0, len(turns) - most) :] for turns in contexts)
            pairs = zip(queries, newest, strict=True)
            conversation = encoded([as_one_text(asked, turns) for asked, turns in pairs])
        arrays[name] = Split(
            query,
            context,
            mask,
            part.positives,
            last_turn,
            part.exclude,
            part.scope,
            contexts,
            queries,
            conversation,
        )
    return arrays


def _with_last_turn(example: Example) -> str:
    return f"{example.context[-1]} {example.query}" if example.context else example.query


def _texts(dataset: Dataset, split: str) -> Texts:
    examples: Sequence[Example] = dataset.splits[split]
    return Texts(
        query_ids=[example.id for example in examples],
        queries=[example.query for example in examples],
        last_turns=[example.context[-1] if example.context else "" for example in examples],
        passage_ids=[passage.id for passage in dataset.corpus],
        passages=[passage.text for passage in dataset.corpus],
    )


def _facts(
    info: Mapping[str, Any], dataset: Dataset, embedded: EmbeddedDataset, encoder: Encoder
) -> dict[str, Any]:
    """Where the numbers come from: data, run and versions."""
    tuning = replace(dataset, splits={name: dataset.splits[name] for name in _TUNING})
    return {
        "data": {
            "hash": embedded.data_hash,
            "trained_on_it": tuning.hash == info.get("data_hash"),
            "encoder": encoder.identity,
            "queries": {name: len(part) for name, part in embedded.splits.items()},
            "turns": {name: int((part.context_rows >= 0).sum()) for name, part in embedded.splits.items()},
            "windowed": {name: part.windowed for name, part in embedded.splits.items()},
        },
        "run": {name: fact for name, fact in info.items() if name != "warmup_seconds"},  # the same each time
        "versions": {
            **{name: version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(jax.devices()[0]),
        },
    }
