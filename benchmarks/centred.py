"""An encoder for studies: all-MiniLM-L6-v2 less the mean of a data folder's passages, scaled to norm 1 again.

    CENTRED_ON=DIR python -m benchmarks.study --data DIR --data.encoder=benchmarks.centred:encoder \
        --data.store=DIR/centred --config configs/frozen.yaml --out FILE.json 'without the mean:'

Queries, turns and passages are moved alike, so that the plain query and every baseline are of the same space.
The mean is that of SAMPLE passages.
"""

import os
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from prime_jax.data.encode import CallableEncoder, load_encoder
from prime_jax.data.records import load_dataset

SAMPLE = 2000
FOLDER = "CENTRED_ON"


@cache
def encoder() -> CallableEncoder:
    """MiniLM around the mean of the passages in the folder that `CENTRED_ON` names."""
    if FOLDER not in os.environ:
        sys.exit(f"set {FOLDER} to the data folder whose passages' mean is removed")
    plain = load_encoder("minilm")
    texts = [passage.text for passage in load_dataset(Path(os.environ[FOLDER]), ("dev",)).corpus]
    chosen = np.random.default_rng(0).permutation(len(texts))[:SAMPLE]
    mean = plain.encode([texts[at] for at in chosen]).mean(axis=0)
    name = f"{plain.identity} less a mean {sha256(mean.tobytes()).hexdigest()[:16]}"
    return CallableEncoder(lambda given: plain.encode(given) - mean, name, plain.dim)
