"""Training a text predictor of MiniLM's shape: our step beside PyTorch's on the same conversations.

    python -m benchmarks.text --out FILE.json [--rounds 12] [--tiny]

Weights and words are random, so nothing is downloaded; only lengths matter. `conversations` are as long as
those of a booking assistant (most are cut at 96 tokens), `questions` have 13 to 50 tokens. Both learn from
the same batches of 32 with the same loss (softmax over 10,882 passages) and AdamW. PyTorch is transformers'
BertModel with fused attention, eager and compiled, padded to the longest text of a batch as
sentence-transformers does; we pack. Every contender has a process of its own and they take turns, a pass over
all batches each. Memory is the peak of the process.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import facts
from benchmarks.text_contenders import BATCHES, CONTENDERS, TASKS, TINY, ours
from benchmarks.training import measure, relative_to, show
from prime_jax.files import write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def main(argv: Sequence[str] | None = None) -> None:
    """Time every contender on every task and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32, help="examples in a batch")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--tiny", action="store_true", help="one narrow layer, to try the command")
    given = parser.parse_args(argv)
    on_gpu = jax.default_backend() == "gpu"
    makers = {name: CONTENDERS[name] for name in given.only}
    if on_gpu and "prime-jax" in makers:
        makers["prime-jax"] = partial(ours, dtype=jnp.bfloat16)
    rows, rounds = (8, 1) if given.tiny else (given.rows, given.rounds)
    found: dict[str, Any] = {"rows": rows, "batches": BATCHES, **facts(*PACKAGES)}
    for name, task in (TINY if given.tiny else TASKS).items():
        results = measure(makers, task, BATCHES * rows, rounds)
        found[name] = relative_to(results, "prime-jax")
        write_json(given.out, found)
        show(f"{name}, a pass over {BATCHES} batches of {rows}", results)


if __name__ == "__main__":
    main()
