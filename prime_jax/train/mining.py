"""Hard negatives for the epochs to come, found with the predictor as it is now."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int32, Int64

from prime_jax.config import TrainingConfig
from prime_jax.data.embedded import EmbeddedDataset
from prime_jax.data.negatives import context_negatives, mine_negatives, searches_of
from prime_jax.train.collective import is_main
from prime_jax.train.predicting import SplitPredictor
from prime_jax.train.state import TrainState

Table = Int32[np.ndarray, "n K"]


def mined_now(
    settings: TrainingConfig, data: EmbeddedDataset, predictor: SplitPredictor, state: TrainState
) -> Table:
    """Corpus rows of each training example's hard negatives, -1 where too few were found.

    Searched with the query, with the right answer and, where targets are frozen, with the prediction. The
    first process searches; all get its table.
    """
    split = data.splits["train"]
    predicted = predictor(state) if state.target_head is None else None  # another space than the passages'
    table = np.full((len(split), settings.mined_negatives), -1, np.int32)
    if is_main():
        found = mine_negatives(
            searches_of(data, split, predicted),
            data,
            split,
            count=settings.mined_negatives,
            margin=settings.mining_margin,
        )
        table[:] = found
    if jax.process_count() > 1:
        table = np.asarray(multihost_utils.broadcast_one_to_all(table))
    return table


def beside_the_given(
    settings: TrainingConfig, data: EmbeddedDataset, mined: Table | None
) -> Int64[np.ndarray, "n more"]:
    """All negatives that the examples do not name themselves: mined ones, and passages among their turns."""
    split = data.splits["train"]
    tables = [np.zeros((len(split), 0), np.int64)]
    if mined is not None:
        tables.append(mined.astype(np.int64))
    if settings.context_negatives:
        tables.append(context_negatives(data, split))
    return np.concatenate(tables, axis=1)
