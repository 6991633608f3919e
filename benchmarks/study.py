"""What helps? Named variants of a configuration, several seeds each, beside tuned baselines on dev.

    python -m benchmarks.study --data DIR --config configs/frozen.yaml --seeds 0 1 2 --out FILE.json \
        'as it is:' 'colder: --train.temperature 0.02' 'wider: --model.hidden-dim 768'

A variant is a name, a colon and settings on top of the configuration and of those given beside the variants
(written --train.seed=1). Its figures are means over the seeds; its comparisons are made query by query with
the mean of the seeds, on whole conversations. Unseen are the queries none of whose right answers is one in
train, or with --unseen KEY those whose record says so. Rows are added to the file one by one; a variant that
is in it already is not run again.
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
from numpy import ndarray

from benchmarks.common import facts, with_defaults
from prime_jax import load
from prime_jax.config import Config, read_config
from prime_jax.data.encode import load_encoder
from prime_jax.data.grouping import conversation_labels
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.baselines import tune
from prime_jax.evaluate.evaluation import baselines
from prime_jax.evaluate.run import embed, predictions, split_arrays
from prime_jax.evaluate.significance import compare
from prime_jax.files import read_json, write_json
from prime_jax.retrieval.metrics import ranking_metrics
from prime_jax.retrieval.novelty import unseen
from prime_jax.retrieval.topk import Rows
from prime_jax.train.loop import train

# Where the data lies, and what only steered models read; kept out of what a file is compared by.
_ELSEWHERE: Any = {"data": {"path", "store"}, "model": {"kind"}, "steering": True, "jasper": True}
METRICS = ("P@5", "R@10", "MRR@10", "nDCG@10")
JUDGED = ("P@5", "MRR@10")
Figures = Mapping[str, ndarray]


class Opened(NamedTuple):
    """A data folder as arrays; of the queries that are judged which are new, and which belong together."""

    hash: str
    splits: Mapping[str, Split]
    judged: Split
    corpus: Corpus
    fresh: ndarray
    groups: ndarray


def opened(config: Config, unseen_key: str | None, judged: str = "dev") -> Opened:
    """Train, dev and the split that is judged, encoded (once; the store is kept beside the data)."""
    if config.steered:
        sys.exit(f"a {config.model.kind} model takes steering, no turns: see benchmarks.steering_study")
    assert config.data.path is not None
    source = config.data
    encoder = load_encoder(source.encoder, source.encoder_precision)
    store = None if source.store is None else Path(source.store)
    names, most = ("train", "dev", *({judged} - {"dev"})), config.model.max_context_length
    dataset, embedded, *_ = embed(Path(config.data.path), names, encoder, source, store=store, max_turns=most)
    one_text = config.model.takes_one_text
    splits = split_arrays(dataset, embedded, encoder, source, one_text=one_text)
    examples = dataset.splits[judged]
    fresh = unseen(splits[judged].positives, splits["train"].positives)
    if unseen_key is not None:
        fresh = np.array([bool(example.extra[unseen_key]) for example in examples])
    corpus = Corpus(embedded.corpus(), embedded.corpus_scope)
    return Opened(dataset.hash, splits, splits[judged], corpus, fresh, conversation_labels(examples))


def measured(vectors: ndarray, data: Opened, memory: Rows | None = None) -> Figures:
    """Every metric of every judged query; `memory` are the passages where a trained head maps them."""
    corpus = data.corpus if memory is None else data.corpus._replace(embeddings=memory)
    found = retrieve(vectors, data.judged, corpus, 10)[1]
    return ranking_metrics(found, data.judged.positives)


def described(figures: Figures, fresh: ndarray) -> dict[str, float]:
    """Means over all queries, and over the unseen and the seen ones where there are both."""
    row = {name: float(figures[name].mean()) for name in METRICS}
    if fresh.any() and not fresh.all():
        row |= {f"unseen {name}": float(figures[name][fresh].mean()) for name in METRICS}
        row |= {f"seen {name}": float(figures[name][~fresh].mean()) for name in METRICS}
    return row


def compared(ours: Figures, rivals: Mapping[str, Figures], data: Opened) -> dict[str, dict[str, Any]]:
    """Ours against every rival: difference, interval and p, of all queries and of the unseen ones."""
    parts = {"": np.ones(len(data.fresh), bool)}
    if data.fresh.any() and not data.fresh.all():
        parts["unseen "] = data.fresh
    return {
        name: {
            f"{part}{metric}": compare(
                ours[metric][rows], theirs[metric][rows], seed=0, groups=data.groups[rows]
            )._asdict()
            for part, rows in parts.items()
            for metric in JUDGED
        }
        for name, theirs in rivals.items()
    }


def tuned_rivals(data: Opened) -> tuple[dict[str, Any], dict[str, Figures]]:
    """Every baseline, tuned on dev: its settings, and its figures for the judged queries."""
    settings, figures = {}, {}
    for baseline in baselines(data.splits["train"], data.splits["dev"], data.corpus):
        settings[baseline.name], _ = tune(baseline, data.splits["dev"], data.corpus)
        figures[baseline.name] = measured(baseline.prepare(data.judged)(settings[baseline.name]), data)
    return settings, figures


def trained(config: Config, run: Path) -> Path:
    """Train, or go on with the run in the folder; a finished one stays as it is."""
    if train(config, run, resume=(run / "config.yaml").is_file()).interrupted:
        sys.exit("stopped; go on with the same command")
    return run


def one_run(config: Config, data: Opened, keep: Path | None) -> tuple[Figures, dict[str, Any]]:
    """Train once; the figures of the checkpoint that is best on dev. Without `keep` the run is removed."""
    judged, started = data.judged, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        predictor = load(trained(config, keep or Path(folder) / "run"), precision="float32")
        memory = predictor.map_memory(data.corpus.embeddings)
        figures = measured(predictions(predictor, judged), data, memory)
        step = predictor.info()["step"]
    spent = time.perf_counter() - started
    return figures, {"seed": config.train.seed, "best_step": step, "seconds": round(spent)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet, and print one line for each variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--unseen", metavar="KEY", help="field of a record that says that it is new")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs, as DIR/VARIANT/SEED")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("variants", nargs="*", metavar="'NAME: SETTINGS'")
    given, shared = parser.parse_known_args(argv)
    if wrong := [word for word in given.variants if ":" not in word]:
        parser.error(f"{wrong[0]!r} is neither NAME: SETTINGS nor a setting such as --train.seed=1")
    common = [f"--data.path={given.data}", *shared]
    base = read_config(given.config, common)
    data = opened(base, given.unseen)
    result: dict[str, Any] = read_json(given.out) if given.out.exists() else {}
    unused = {} if base.hybrid.watching else {"hybrid": True}
    exclude = {**_ELSEWHERE, **unused}
    told = base.model_dump(mode="json", exclude=exclude)
    if "config" in result:
        result["config"] = with_defaults(result["config"], exclude)
    same = {"data_hash": data.hash, "seeds": given.seeds, "unseen_key": given.unseen, "config": told}
    if any(result.get(name, value) != value for name, value in same.items()):
        parser.error(f"{given.out} holds a study of other data or settings; choose another file")
    settings, rivals = tuned_rivals(data)
    described_rivals: dict[str, Any] = {
        name: {"settings": settings[name], **described(rivals[name], data.fresh)} for name in rivals
    }
    for name, row in described_rivals.items():
        print(line(name, row))
    result |= {
        "set": given.data.name,
        "queries": len(data.fresh),
        "unseen": int(data.fresh.sum()),
        "groups": len(np.unique(data.groups)),
        "passages": len(data.corpus.embeddings),
        **same,
        "baselines": described_rivals,
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
        if (
            configs[0].data != base.data
            or configs[0].model.max_context_length != base.model.max_context_length
        ):
            parser.error(f"{name}: changes what is read; make that a study of its own, with another --out")
        folders = [given.keep and given.keep / name / str(seed) for seed in given.seeds]
        runs = [one_run(config, data, kept) for config, kept in zip(configs, folders, strict=True)]
        mean = {metric: np.mean([figures[metric] for figures, _ in runs], axis=0) for metric in METRICS}
        means = described(mean, data.fresh)
        seeds = [{**about, **described(figures, data.fresh)} for figures, about in runs]
        spread = {
            metric: statistics.stdev(seed[metric] for seed in seeds) if len(seeds) > 1 else None
            for metric in means
        }
        row = {"settings": words.split(), "mean": means, "stdev": spread, "seeds": seeds}
        row["against"] = compared(mean, rivals, data)
        result.setdefault("variants", {})[name] = row
        write_json(given.out, result)
        print(line(name, means, spread), flush=True)
    write_json(given.out, result)


def line(name: str, means: Mapping[str, Any], spread: Mapping[str, Any] | None = None) -> str:
    """The figures that one looks at first."""
    shown = [metric for metric in ("P@5", "MRR@10", "unseen P@5", "unseen MRR@10") if metric in means]
    parts = []
    for metric in shown:
        around = (spread or {}).get(metric)
        parts.append(f"{metric} {means[metric]:.3f}" + (f" ±{around:.3f}" if around is not None else ""))
    return f"{name:24} {'  '.join(parts)}"


if __name__ == "__main__":
    main()
