"""Does a predictor that was trained on other conversations help on these? Leave each set out in turn.

    python -m benchmarks.leave_one_out --out FILE.json [--config configs/general.yaml] [--rows 2000]
        [--share 0.5] [--seeds 0] [--only NAME ...] [--keep DIR] NAME=DIR ... [--section.setting=VALUE ...]

For every set a text predictor is trained on all the others together (`prime-jax combine`, about so many
examples of each), and judged on the dev split of the one that was left out, of which nothing was seen. Its
rows:

- query; mix, the untrained one with weight 0.3 and decay 0.5; text, the untrained encoder's vector of query
  and turns plus the query's own; text_same, the same with the weight of `model.query_weight`;
- general, the trained predictor, a --share of the way from the encoder to what was learned; general_query and
  general_mix, the mean of its vector and that of the query or the mix.

Nothing is tuned on a set that is judged. Figures are MRR@10 and P@5 with 95% intervals over conversations,
each row's difference to the query, and that of general to the untrained rows. A set that is done is in the
file at once, and the same command goes on from there; --keep keeps the runs. Embeddings are kept where
--data.store says.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy import ndarray

from benchmarks.common import facts
from benchmarks.study import trained
from prime_jax import load, untrained
from prime_jax.config import Config, read_config
from prime_jax.data.combine import combined
from prime_jax.data.encode import Encoder, load_encoder
from prime_jax.data.grouping import conversation_labels
from prime_jax.data.records import load_dataset, write_dataset
from prime_jax.errors import DataError
from prime_jax.evaluate.arrays import Corpus, Split, retrieve
from prime_jax.evaluate.run import embed, split_arrays
from prime_jax.evaluate.significance import compare, interval
from prime_jax.files import read_json, write_json
from prime_jax.models import Model
from prime_jax.models.mix import DECAY, WEIGHT
from prime_jax.models.text import TextConfig, TextPredictor
from prime_jax.predict.predictor import Predictor
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.retrieval.metrics import DEPTH, ranking_metrics
from prime_jax.retrieval.mix import RecencyMix
from prime_jax.retrieval.vectors import unit
from prime_jax.train.text_start import started_model, starting_params

METRICS = ("P@5", "MRR@10")
UNTRAINED = ("query", "mix", "text", "text_same")
CONFIG = Path(__file__).parents[1] / "configs" / "general.yaml"


def vectors_of(general: Predictor, plain: Mapping[str, Predictor], dev: Split) -> dict[str, ndarray]:
    """What each row searches with, `[Q, E]`, unit norm; `plain` are untrained readers of texts."""
    assert dev.context_texts is not None
    assert dev.query_texts is not None
    query, mix = unit(dev.query), RecencyMix(WEIGHT, DECAY)(dev.context, dev.mask, dev.query)
    read = general.predict_text(dev.context_texts, dev.query_texts)
    return {
        "query": query,
        "mix": mix,
        **{name: one.predict_text(dev.context_texts, dev.query_texts) for name, one in plain.items()},
        "general": read,
        "general_query": unit(read + query),
        "general_mix": unit(read + mix),
    }


def evaluate_set(general: Predictor, config: Config, folder: Path) -> dict[str, Any]:
    """Every row on the dev split of a set."""
    source, most = config.data, config.model.max_context_length
    encoder = load_encoder(source.encoder, source.encoder_precision)
    store = None if source.store is None else Path(source.store)
    data = embed(folder, ("dev",), encoder, source, store=store, max_turns=most)
    dev = split_arrays(data.dataset, data.embedded, encoder, source, joined_texts=False)["dev"]
    corpus = Corpus(data.embedded.corpus(), data.embedded.corpus_scope)
    groups = conversation_labels(data.dataset.splits["dev"])
    assert isinstance(config.model, TextConfig)
    plain = {
        name: untrained(encoder=encoder, max_turns=most, weight=weight, query_prefix=source.query_prefix)
        for name, weight in (("text", None), ("text_same", config.model.query_weight))
    }
    found = {
        name: ranking_metrics(retrieve(vectors, dev, corpus, DEPTH)[1], dev.positives)
        for name, vectors in vectors_of(general, plain, dev).items()
    }
    mrr = {name: figures["MRR@10"] for name, figures in found.items()}

    def difference(better: str, than: str) -> dict[str, Any]:
        return compare(mrr[better], mrr[than], seed=0, groups=groups)._asdict()

    rows = {
        name: {
            **{metric: float(np.mean(figures[metric])) for metric in METRICS},
            "interval": list(map(float, interval(mrr[name], seed=0, groups=groups))),
            "against_query": difference(name, "query"),
        }
        for name, figures in found.items()
    }
    return {
        "questions": len(dev.query),
        "conversations": len(np.unique(groups)),
        "rows": rows,
        "general_against": {name: difference("general", name) for name in UNTRAINED},
    }


def with_share(model: Model, encoder: Encoder, share: float) -> Predictor:
    """A text predictor a share of the way from its encoder to its own weights."""
    assert isinstance(model, TextPredictor)
    assert isinstance(encoder, BertTextEncoder)
    start, end = starting_params(model.config, encoder), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params = jax.tree.map(lambda a, b: np.asarray(a + share * (np.asarray(b, np.float32) - a)), start, end)
    return Predictor(started_model(model.config, params), facts={"source": str(encoder.source.transformer)})


def trained_without(
    name: str, sets: Mapping[str, Path], given: argparse.Namespace, words: Sequence[str], seed: int, out: Path
) -> Config:
    """Train on all sets but one, and give the configuration; the run is in `out`."""
    others = {
        other: load_dataset(folder, ("train", "dev")) for other, folder in sets.items() if other != name
    }
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "sets"
        write_dataset(data, combined(others, {"train": given.rows, "dev": given.dev_rows}, seed=seed))
        config = read_config(given.config, [f"--data.path={data}", f"--train.seed={seed}", *words])
        trained(config, out)
    return config


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Data folders by the names that stand before them.

    Raises:
        DataError: If one has no name, or there is no such folder.
    """
    named = (word.partition("=") for word in words)
    folders = {name: Path(folder or "nowhere") for name, _, folder in named}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise DataError(f"{name}: name sets as NAME=DIR; {folder} is no folder")
    return folders


def means(left_out: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean MRR@10 of each row over all sets and seeds that are there."""
    tables = [cell["rows"] for seeds in left_out.values() for cell in seeds.values()]
    return {name: float(np.mean([rows[name]["MRR@10"] for rows in tables])) for name in tables[0]}


def main(argv: Sequence[str] | None = None) -> None:
    """Leave out what the file lacks, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE")
    parser.add_argument("--rows", type=int, default=2000, help="of each set's train, about")
    parser.add_argument(
        "--dev-rows", type=int, default=100, help="of each set's dev, which chooses checkpoints"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of what was learned (default: 0.5)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sets to leave out")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs, as DIR/NAME/SEED")
    parser.add_argument("sets", nargs="+", metavar="NAME=DIR")
    given, words = parser.parse_known_args(argv)
    sets = named_folders(given.sets)
    if not any(word.startswith("--data.store") for word in words):
        raise DataError("name a folder for embeddings with --data.store=DIR")
    if len(sets) < 2:
        raise DataError("name two sets or more, as NAME=DIR")
    if unknown := set(given.only or ()) - set(sets):
        raise DataError(f"--only: there is no set {unknown.pop()}; there are {', '.join(sets)}")
    same = {
        **{"sets": sorted(sets), "rows": given.rows, "share": given.share},
        **{"config": given.config.name, "settings": list(words)},
    }
    result: dict[str, Any] = read_json(given.out) if given.out.exists() else {"made_of": same, "left_out": {}}
    if result["made_of"] != same:
        raise DataError(f"{given.out}: was made of something else; choose another --out")
    for name in given.only or sets:
        done = result["left_out"].setdefault(name, {})
        for seed in given.seeds:
            if str(seed) in done:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                run = (given.keep or Path(scratch)) / name / str(seed)
                config = trained_without(name, sets, given, words, seed, run)
                found = load(run, precision="float32").model
                encoder = load_encoder(config.data.encoder, config.data.encoder_precision)
                general = with_share(found, encoder, given.share)
                done[str(seed)] = evaluate_set(general, config, sets[name])
            result["mean_MRR@10"] = means(result["left_out"])
            write_json(given.out, {**result, **facts("jax", "flax", "optax")})
            for row, figures in done[str(seed)]["rows"].items():
                against = figures["against_query"]
                print(
                    f"{name:12} {row:14} P@5 {figures['P@5']:.3f} MRR@10 {figures['MRR@10']:.3f} "
                    f"({against['difference']:+.3f}, p {against['p']:.4f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
