"""What does a question cost before anything is trained, at batch 1?

    python -m benchmarks.first_day --data DIR --out FILE.json [--questions 100] [--encoder minilm]

Milliseconds per question of dev, medians and 95th percentiles, the contenders taking turns on each question:

- query: the encoder embeds the query, which an application does anyway;
- mix: `prime_jax.untrained(dim)` on embeddings that are there already;
- text: `prime_jax.untrained(encoder=...)`, from texts;
- general: `prime_jax.general()`, from texts (MiniLM alone).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import facts
from prime_jax import general, untrained
from prime_jax.data.encode import load_encoder
from prime_jax.data.records import load_dataset
from prime_jax.files import write_json

TURNS = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--encoder", default="minilm")
    given = parser.parse_args(argv)
    encoder = load_encoder(given.encoder)
    asked = load_dataset(given.data, ("dev",)).splits["dev"][: given.questions]
    mix, text = untrained(encoder.dim, max_turns=TURNS), untrained(encoder=encoder, max_turns=TURNS)
    embedded = [
        (encoder.encode(list(example.context[-TURNS:])), encoder.encode([example.query])[0])
        for example in asked
    ]
    contenders: dict[str, Callable[[int], object]] = {
        "query": lambda row: encoder.encode([asked[row].query]),
        "mix": lambda row: mix.predict(*embedded[row]),
        "text": lambda row: text.predict_text(list(asked[row].context[-TURNS:]), asked[row].query),
    }
    if given.encoder == "minilm":
        reader = general()
        contenders["general"] = lambda row: reader.predict_text(
            list(asked[row].context[-TURNS:]), asked[row].query
        )
    for contender in contenders.values():  # compile what will occur
        for row in range(len(asked)):
            contender(row)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for row in range(len(asked)):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender(row)
            seconds[name].append(time.perf_counter() - started)
    query = float(np.median(seconds["query"]))
    rows = {
        name: {
            "ms_median": 1e3 * float(np.median(taken)),
            "ms_p95": 1e3 * float(np.quantile(taken, 0.95)),
            "of_query": float(np.median(taken)) / query,
        }
        for name, taken in seconds.items()
    }
    for name, figures in rows.items():
        print(f"{name:8} {figures['ms_median']:7.2f} ms, 95th percentile {figures['ms_p95']:7.2f} ms")
    write_json(
        given.out,
        {"set": given.data.name, "questions": len(asked), "contenders": rows, **facts("jax", "numpy")},
    )


if __name__ == "__main__":
    main()
