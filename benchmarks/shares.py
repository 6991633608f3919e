"""How much of what was learned, and of the query itself, is best on conversations of other kinds?

    python -m benchmarks.shares --run RUN --out FILE.json NAME=DIR ... [--data.store=DIR]

Takes a run of a text predictor and judges it on the dev split of each set, with a share of the way from the
encoder to the run's weights (WiSE-FT, arXiv 2109.01903; 0 is the encoder itself) and with the encoder's own
embedding of the query added at some weight. MRR@10; sets that were left out of training say what to ship.
A set that is done is in the file at once, and the same command goes on from there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import facts
from benchmarks.leave_one_out import named_folders, with_share
from prime_jax import load
from prime_jax.config import read_config
from prime_jax.data.encode import load_encoder
from prime_jax.errors import DataError
from prime_jax.evaluate.arrays import Corpus, retrieve
from prime_jax.evaluate.run import embed, split_arrays
from prime_jax.files import read_json, write_json
from prime_jax.models.text import TextConfig
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.retrieval.metrics import DEPTH, ranking_metrics
from prime_jax.retrieval.vectors import unit

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
WEIGHTS = (0.0, 0.25, 0.5, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Judge what the file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("sets", nargs="+", metavar="NAME=DIR")
    given, words = parser.parse_known_args(argv)
    config = read_config(given.run / "config.yaml", words)
    model, encoder = load(given.run, precision="float32").model, load_encoder(config.data.encoder)
    if not isinstance(model.config, TextConfig) or not isinstance(encoder, BertTextEncoder):
        raise DataError(f"{given.run}: is no run of a text predictor")
    store = None if config.data.store is None else Path(config.data.store)
    result: dict[str, Any] = read_json(given.out) if given.out.exists() else {"on": {}}
    for name, folder in named_folders(given.sets).items():
        if name in result["on"]:
            continue
        most = model.config.max_context_length
        data = embed(folder, ("dev",), encoder, config.data, store=store, max_turns=most)
        dev = split_arrays(data.dataset, data.embedded, encoder, config.data, joined_texts=False)["dev"]
        corpus = Corpus(data.embedded.corpus(), data.embedded.corpus_scope)
        assert dev.context_texts is not None
        assert dev.query_texts is not None
        cells: dict[str, dict[str, float]] = {}
        for share in SHARES:
            one = with_share(model, encoder, share)
            vectors = one.predict_text(dev.context_texts, dev.query_texts)
            cells[f"{share:g}"] = {
                f"{weight:g}": float(
                    np.mean(
                        ranking_metrics(
                            retrieve(unit(vectors + weight * unit(dev.query)), dev, corpus, DEPTH)[1],
                            dev.positives,
                        )["MRR@10"]
                    )
                )
                for weight in WEIGHTS
            }
            print(f"{name:10} share {share:4g}", cells[f"{share:g}"], flush=True)
        result["on"][name] = cells
        told = config.model_dump(mode="json", include={"model", "train"})
        write_json(given.out, {**result, "run": told, **facts("jax", "flax")})


if __name__ == "__main__":
    main()
