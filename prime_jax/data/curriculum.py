"""Which steering each row of a training batch gets: less and less often none (JASPER plan; ERRATA)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from prime_jax.data.embedded import EMPTY, EmbeddedDataset
from prime_jax.data.steered import Steering, steering_rows, variant_code

_STREAM = 17  # tells these random numbers from those of other users of the seed


@dataclass(frozen=True)
class Curriculum:
    """Draws a steering variant for every row of every batch, from the seed and the batch's number alone.

    Attributes:
        variants: What is drawn from where a row has steering, each equally often.
        zero_start: Share of rows without steering in the first epoch.
        zero_end: That share after `zero_epochs`, and from then on.
        zero_epochs: Epochs from the first to the last share, on a line.
    """

    variants: tuple[str, ...]
    zero_start: float = 0.5
    zero_end: float = 0.1
    zero_epochs: float = 100.0

    def zero_share(self, epoch: float) -> float:
        """Share of rows without steering after `epoch` epochs."""
        done = min(max(epoch / self.zero_epochs, 0.0), 1.0)
        return self.zero_start + (self.zero_end - self.zero_start) * done

    def draw(self, place: int, rows: int, *, seed: int, epoch: float) -> Int64[np.ndarray, " rows"]:
        """Variant codes of a batch: 0 for none, otherwise `variant_code`."""
        random = np.random.default_rng([seed, _STREAM, place])
        codes = np.array([variant_code(name) for name in self.variants])
        drawn = codes[random.integers(len(codes), size=rows)]
        return np.where(random.random(rows) < self.zero_share(epoch), 0, drawn)


@dataclass(frozen=True)
class SteeredRows:
    """What steering adds to the rows of a split's training batches.

    Attributes:
        data: As `steered` gave it.
        split: Name of the split.
        steering: Its steering.
        curriculum: Who gets which.
        hard_negatives: Whether rows bring the steering folder's negatives.
    """

    data: EmbeddedDataset
    split: str
    steering: Steering
    curriculum: Curriculum
    hard_negatives: bool = True

    def turns(
        self, pairs: Int64[np.ndarray, " b"], codes: Int64[np.ndarray, " b"]
    ) -> Int64[np.ndarray, "b 1"]:
        """Store rows of the steering of some pairs."""
        return steering_rows(self.data, self.steering, self.split, pairs, codes)

    def rights(self) -> tuple[Int64[np.ndarray, " _"], ...]:
        """Per example the right answers of all examples with the same question; none is a negative."""
        examples = self.data.splits[self.split]
        known: dict[int, set[int]] = {}
        for query, ids in zip(examples.query_rows.tolist(), examples.positives, strict=True):
            known.setdefault(query, set()).update(ids.tolist())
        return tuple(np.array(sorted(known[query]), np.int64) for query in examples.query_rows.tolist())

    def clusters(self, pairs: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        """Clusters of the right answers of some pairs."""
        return np.asarray(self.steering.clusters(self.split)[pairs], np.int64)

    def negatives(self, pairs: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, "b T"]:
        """Corpus rows of their hard negatives, -1 for none; `[b, 0]` where they are not used."""
        if not self.hard_negatives:
            return np.full((len(pairs), 0), EMPTY, np.int64)
        return np.asarray(self.steering.negatives(self.split)[pairs], np.int64)
