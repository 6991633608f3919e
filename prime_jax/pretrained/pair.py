"""Two encoders that were trained with a predictor: X for turns and queries, Y for passages of the memory.

Predictions live in Y's space. On disk a pair is a folder with `x/` and `y/`, each the folder of an encoder.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from prime_jax.errors import DataError
from prime_jax.nn.encoder_products import EncoderPrecision
from prime_jax.pretrained.bert import BertTextEncoder, check_texts
from prime_jax.pretrained.writing import write_encoder

PASSAGE = "\x02"
"""Stands in front of a passage where texts of both kinds are encoded and stored together."""

FOLDER = "encoder"  # of a checkpoint or bundle


class PairedEncoder:
    """An `Encoder` whose texts say which of the two embeds them: `passage_mark` begins those for Y.

    So a passage and a turn of the same words have an embedding each, in one store.

    Attributes:
        x: Embeds turns and queries.
        y: Embeds passages.
        identity: Names both.
        dim: Width of the embeddings.
        passage_mark: What stands in front of passages.

    Raises:
        DataError: If the two give embeddings of other widths.
    """

    passage_mark = PASSAGE

    def __init__(self, x: BertTextEncoder, y: BertTextEncoder):
        if x.dim != y.dim:
            raise DataError(f"the X-encoder gives {x.dim} dimensions, the Y-encoder {y.dim}")
        self.x, self.y, self.dim = x, y, x.dim
        both = hashlib.sha256(f"{x.identity} {y.identity}".encode()).hexdigest()[:12]
        self.identity = f"trained-{both}"

    @property
    def truncated(self) -> int:
        """How many of the texts encoded so far were cut."""
        return self.x.truncated + self.y.truncated

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Embed texts as float32 `[n, dim]` of unit norm, in their order.

        Raises:
            DataError: If an entry is not a string.
        """
        check_texts(texts)
        answers = np.empty((len(texts), self.dim), np.float32)
        passage = np.array([text.startswith(PASSAGE) for text in texts], bool)
        for encoder, rows in ((self.x, np.flatnonzero(~passage)), (self.y, np.flatnonzero(passage))):
            if rows.size:
                answers[rows] = encoder.encode([texts[int(row)].removeprefix(PASSAGE) for row in rows])
        return answers


def is_pair(folder: Path) -> bool:
    """Whether a folder holds a pair."""
    return (folder / "x").is_dir() and (folder / "y").is_dir()


def load_pair(folder: Path, precision: EncoderPrecision | None = None) -> PairedEncoder:
    """Read what `write_pair` wrote, to compute in `precision` (see `BertTextEncoder`).

    Raises:
        DataError: If a file or tensor is missing, damaged or not supported; the message names it.
    """
    x, y = (BertTextEncoder(folder / name, precision=precision) for name in ("x", "y"))
    return PairedEncoder(x, y)


def write_pair(pair: PairedEncoder, folder: Path) -> None:
    """Write both encoders' folders into `folder`, which must not have them yet."""
    write_encoder(pair.x, folder / "x")
    write_encoder(pair.y, folder / "y")
