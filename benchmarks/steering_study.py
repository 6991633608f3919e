"""What does JASPER owe to its parts? Named variants, several seeds each, under every kind of steering.

    python -m benchmarks.steering_study --data DIR --config configs/jasper_subspace.yaml --split test \
        --seeds 0 1 2 --out FILE.json 'as it is:' 'no VICReg: --jasper.vicreg 0'

DIR needs the folder that `prime-jax steering` writes. A variant is a name, a colon and settings on top of
the configuration. Every run is selected on dev and measured on --split with zero steering, with steering made
from the question alone (keyword, residual, predicted), and with `centroid`, which leaks the answer's cluster
and is reported to show what knowing it would be worth. Comparisons with the plain question, and with a ridge
regression of the question, are made query by query with the mean of the seeds, on whole conversations. Rows
are added one by one; a variant that is in the file already is not run again.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from numpy import ndarray

from benchmarks.common import facts, with_defaults
from benchmarks.study import JUDGED, METRICS, Figures
from prime_jax import load
from prime_jax.config import Config, read_config
from prime_jax.data.embedded import embed_dataset
from prime_jax.data.encode import load_encoder
from prime_jax.data.grouping import conversation_labels
from prime_jax.data.prepare import prepare
from prime_jax.data.steered import VARIANTS, ZERO, Steering, open_steering, steered
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.baselines import tune
from prime_jax.evaluate.evaluation import baselines
from prime_jax.evaluate.run import split_arrays
from prime_jax.evaluate.significance import compare
from prime_jax.files import read_json, write_json
from prime_jax.models import Model
from prime_jax.retrieval.metrics import ranking_metrics
from prime_jax.train.loop import train
from prime_jax.train.setup import steering_folder

_ELSEWHERE: Any = {"data": {"path", "store"}, "steering": {"path"}}
STEERED = (ZERO, *VARIANTS)


class Opened(NamedTuple):
    """A data folder as arrays, for one split under every steering."""

    hash: str
    split: Mapping[str, Split]
    cluster: ndarray
    rivals: Mapping[str, Figures]
    corpus: Corpus
    groups: ndarray
    steering: Steering


def opened(config: Config, split: str) -> Opened:
    """Train, dev and the split to measure on; the ridge regression is fitted on train and tuned on dev."""
    assert config.data.path is not None
    source, encoder = config.data, load_encoder(config.data.encoder)
    prefixes: Any = {"query_prefix": source.query_prefix, "passage_prefix": source.passage_prefix}
    names = tuple(dict.fromkeys(("train", "dev", split)))
    kept = None if source.store is None else Path(source.store)
    dataset, store = prepare(Path(config.data.path), names, encoder, store_folder=kept, **prefixes)
    embedded = embed_dataset(dataset, store, max_context_length=1, **prefixes)
    steering = open_steering(steering_folder(config), embedded, encoder.identity, **prefixes)
    arrays = {
        variant: split_arrays(
            dataset, steered(embedded, steering, variant), encoder, source, joined_texts=False
        )
        for variant in STEERED
    }
    corpus = Corpus(embedded.corpus(), embedded.corpus_scope)
    plain = arrays[ZERO]
    rivals = {}
    for baseline in baselines(plain["train"], plain["dev"], corpus):
        if baseline.name in ("query", "ridge"):
            chosen, _ = tune(baseline, plain["dev"], corpus)
            vectors = baseline.prepare(plain[split])(chosen)
            rivals[baseline.name] = _figures(vectors, plain[split], corpus)
    counts = np.array([len(ids) for ids in embedded.splits[split].positives])
    cluster = np.asarray(steering.clusters(split)[np.cumsum(counts) - counts])
    return Opened(
        dataset.hash,
        {variant: parts[split] for variant, parts in arrays.items()},
        cluster,
        rivals,
        corpus,
        conversation_labels(dataset.splits[split]),
        steering,
    )


def _figures(vectors: ndarray, split: Split, corpus: Corpus) -> Figures:
    return ranking_metrics(retrieve(vectors, split, corpus, 10)[1], split.positives)


def routed(model: Model, split: Split, cluster: ndarray) -> dict[str, float]:
    """How often the router knows the cluster, how sure it is, and how far the fine part goes."""
    found = nnx.jit(lambda net, *inputs: net.details(*inputs))(model, split.context, split.query, split.mask)
    if found.routing is None:
        return {}
    weights = np.asarray(found.routing)
    entropy = -np.sum(weights * np.log(np.maximum(weights, 1e-12)), axis=1)
    usage = weights.mean(axis=0)
    return {
        "routing accuracy": float(np.mean(np.argmax(weights, axis=1) == cluster)),
        "routing entropy": float(entropy.mean()),
        "subspaces in use": float(np.exp(-np.sum(usage * np.log(np.maximum(usage, 1e-12))))),
        "atypicality": float(np.linalg.norm(np.asarray(found.fine), axis=1).mean()),
    }


def one_run(config: Config, data: Opened) -> tuple[dict[str, Figures], dict[str, Any]]:
    """Train once; the figures of its best checkpoint under every steering."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if train(config, Path(folder) / "run").interrupted:
            sys.exit("stopped; go on with the same command")
        predictor = load(Path(folder) / "run", precision="float32")
    found, routing = {}, {}
    for variant, split in data.split.items():
        found[variant] = _figures(
            predictor.predict(split.context, split.query, split.mask), split, data.corpus
        )
        routing[variant] = routed(predictor.model, split, data.cluster)
    spent = round(time.perf_counter() - started)
    about = {"seed": config.train.seed, "best_step": predictor.info()["step"], "seconds": spent}
    return found, {**about, "routing": routing}


def described(runs: Sequence[tuple[dict[str, Figures], dict[str, Any]]], data: Opened) -> dict[str, Any]:
    """Means over the seeds under every steering, and the comparison with the rivals."""
    told: dict[str, Any] = {}
    for variant in STEERED:
        mean = {name: np.mean([found[variant][name] for found, _ in runs], axis=0) for name in METRICS}
        each = {name: [float(found[variant][name].mean()) for found, _ in runs] for name in METRICS}
        routing = [about["routing"][variant] for _, about in runs]
        told[variant] = {
            "mean": {name: float(values.mean()) for name, values in mean.items()},
            "stdev": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in each.items()},
            "routing": {name: statistics.mean(one[name] for one in routing) for name in routing[0]},
            "against": {
                rival: {
                    name: compare(mean[name], theirs[name], seed=0, groups=data.groups)._asdict()
                    for name in JUDGED
                }
                for rival, theirs in data.rivals.items()
            },
        }
    return told


def line(name: str, told: Mapping[str, Any]) -> str:
    """The figures that one looks at first."""
    parts = [f"{variant} {told[variant]['mean']['MRR@10']:.3f}" for variant in STEERED]
    accuracy = told["predicted"]["routing"].get("routing accuracy")
    routing = "" if accuracy is None else f"  routing {accuracy:.3f}"
    return f"{name:28} MRR@10 {'  '.join(parts)}{routing}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet, and print one line for each variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("variants", nargs="*", metavar="'NAME: SETTINGS'")
    given, shared = parser.parse_known_args(argv)
    if wrong := [word for word in given.variants if ":" not in word]:
        parser.error(f"{wrong[0]!r} is neither NAME: SETTINGS nor a setting such as --train.seed=1")
    common = [f"--data.path={given.data}", "--model.use-torch-compile=false", *shared]
    base = read_config(given.config, common)
    data = opened(base, given.split)
    result: dict[str, Any] = read_json(given.out) if given.out.exists() else {}
    told = base.model_dump(mode="json", exclude=_ELSEWHERE)
    if "config" in result:
        result["config"] = with_defaults(result["config"], _ELSEWHERE)
    same = {"data_hash": data.hash, "seeds": given.seeds, "split": given.split, "config": told}
    if any(result.get(name, value) != value for name, value in same.items()):
        parser.error(f"{given.out} holds a study of other data or settings; choose another file")
    result |= {
        "set": given.data.name,
        "queries": len(data.groups),
        "groups": len(np.unique(data.groups)),
        "clusters": len(data.steering.names),
        "known_clusters": dict(data.steering.facts["routing"][given.split]),
        **same,
        "rivals": {
            name: {metric: float(figures[metric].mean()) for metric in METRICS}
            for name, figures in data.rivals.items()
        },
        **facts("jax", "flax", "optax"),
    }
    for variant in given.variants:
        name, _, words = variant.partition(":")
        if name in result.get("variants", {}):
            if result["variants"][name]["settings"] != words.split():
                parser.error(f"{given.out} holds another variant {name!r}; give this one another name")
            continue
        configs = [
            read_config(given.config, [*common, *words.split(), f"--train.seed={seed}"])
            for seed in given.seeds
        ]
        if configs[0].data != base.data or configs[0].steering.path != base.steering.path:
            parser.error(f"{name}: changes what is read; make that a study of its own, with another --out")
        runs = [one_run(config, data) for config in configs]
        row = {"settings": words.split(), "seeds": [about for _, about in runs], **described(runs, data)}
        result.setdefault("variants", {})[name] = row
        write_json(given.out, result)
        print(line(name, row), flush=True)
    write_json(given.out, result)


if __name__ == "__main__":
    main()
