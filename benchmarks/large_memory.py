"""How much memory does an evaluation take beside a memory of a million passages?

    python -m benchmarks.large_memory --out benchmarks/results/large_memory.json

Makes a data folder of random passages, 1,000,000 x 1024 in float16, and 1,000 questions near some of them;
encodes, trains a small model for one epoch and evaluates it, each with the real command. Watched is what the
evaluation holds itself (RssAnon and RssShmem of /proc, Linux alone); pages of the store, which the system
reads and drops as it likes, are counted apart. Needs 2 GB of disk and a quarter of an hour on two cores.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.common import facts
from prime_jax.files import write_json
from prime_jax.frozen import Frozen

DIM = 1024
SPLITS = {"train": 256, "dev": 20, "test": 1000}


class RandomEncoder:
    """Random unit vectors; the text "near N" is encoded near the text "passage N"."""

    identity, dim = f"random-{DIM}@1", DIM

    def encode(self, texts: Sequence[str]) -> ndarray:
        """Embeddings of texts, `[n, 1024]`, float32."""
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> ndarray:
        vector = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIM, np.float32)
        if found := re.fullmatch(r"near (\d+) .*", text):
            vector = 1.5 * vector + self._one(f"passage {found[1]}") * np.sqrt(DIM)
        return np.asarray(vector / np.linalg.norm(vector), np.float32)


ENCODER = RandomEncoder()


class Peak(Frozen):
    """The most that a process held at once, in GB.

    Attributes:
        own: Memory of its own.
        mapped: Pages of files.
        seconds: How long it ran.
    """

    own: float
    mapped: float
    seconds: float


def watched(command: Sequence[str]) -> Peak:
    """Run a command to its end, looking at its memory ten times a second."""
    most = {"RssAnon": 0.0, "RssShmem": 0.0, "RssFile": 0.0}
    started = time.perf_counter()
    process = subprocess.Popen(command)

    def look() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except (OSError, ValueError):
                return
            for name in most:
                most[name] = max(most[name], int(lines.get(name, "0 kB").split()[0]) / 1e6)
            time.sleep(0.1)

    eye = threading.Thread(target=look)
    eye.start()
    code = process.wait()
    eye.join()
    if code:
        sys.exit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - started
    return Peak(own=most["RssAnon"] + most["RssShmem"], mapped=most["RssFile"], seconds=seconds)


def write_data(folder: Path, passages: int) -> None:
    """Passages, and questions near some of them."""
    with (folder / "corpus.jsonl").open("w") as stream:
        stream.writelines(f'{{"id": "p{row}", "text": "passage {row}"}}\n' for row in range(passages))
    rows = np.random.default_rng(0).permutation(passages)
    for split, count in SPLITS.items():
        chosen, rows = rows[:count], rows[count:]
        with (folder / f"{split}.jsonl").open("w") as stream:
            for row in chosen:
                stream.write(
                    f'{{"id": "q{row}", "context": ["near {row} turn"], "query": "near {row} question", '
                    f'"positives": ["p{row}"]}}\n'
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, run the commands, write what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--index", default="exact", help="what searches (prime_jax.evaluate --index)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(argv)
    encoder = "benchmarks.large_memory:ENCODER"
    module = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as place:
        data, run = Path(place) / "data", Path(place) / "run"
        data.mkdir()
        write_data(data, given.passages)
        encode = ["prime_jax.data.encode", "--data", str(data), "--encoder", encoder, "--dtype", "float16"]
        train = ["prime_jax.train", "--out", str(run), f"--data.path={data}", f"--data.encoder={encoder}"]
        train += ["--model.hidden-dim=128", "--model.num-layers=1", "--model.residual=copy"]
        train += ["--train.num-epochs=1", "--train.mixed-precision=false"]
        evaluate = ["prime_jax.evaluate", "--run", str(run), "--data", str(data)]
        evaluate += ["--out", str(Path(place) / "report"), "--index", given.index]
        peaks: dict[str, Any] = {}
        for name, command in (("encode", encode), ("train", train), ("evaluate", evaluate)):
            peaks[name] = watched([*module, *command]).model_dump()
            print(name, {key: round(value, 2) for key, value in peaks[name].items()}, flush=True)
        store = sum(file.stat().st_size for file in data.rglob("shard-*"))
    result = {
        "passages": given.passages,
        "dim": DIM,
        "queries": SPLITS,
        "index": given.index,
        "store_gb": store / 1e9,
        "peak_gb": peaks,
        **facts("jax", "numpy"),
    }
    write_json(given.out, result)


if __name__ == "__main__":
    main()
