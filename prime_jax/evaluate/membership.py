"""Can an outsider tell from predictions which conversations a model was trained on (SEC-PRED-002)?

A membership-inference attack with the strongest simple means: whoever holds a conversation, embeds it, asks
the predictor and looks how close the prediction comes to what was really said next. A model that has learned
its training data by heart comes closer there than on conversations it never saw. Two controls tell memory
from chance: the same attack with the plain query, which knows nothing about training, and the attack with the
plain query's closeness taken off, so that merely easy conversations do not count (difficulty calibration,
Watson et al. 2022). Thresholds on a loss are from Yeom et al. 2018; to report what an attacker finds at one
false alarm in a hundred, not the average alone, from Carlini et al. 2022.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray
from scipy import stats

from prime_jax.errors import DataError

DRAWS = 1000
FALSE_ALARMS = 0.01
ATTACKS = ("prediction", "query", "calibrated")


class Closeness(NamedTuple):
    """How close vectors come to the right answers of the examples of one side.

    Attributes:
        prediction: Cosine of the prediction and the nearest right answer, `[n]`.
        query: Cosine of the query and the nearest right answer, `[n]`; None where they cannot be compared.
        conversation: Label of the conversation each example belongs to, `[n]`.
    """

    prediction: Float32[ndarray, " n"]
    query: Float32[ndarray, " n"] | None
    conversation: Int64[ndarray, " n"]

    def of(self, attack: str) -> ndarray:
        """The score that an attack thresholds, averaged over each conversation, `[G]`."""
        scores = self.prediction - self.query if attack == "calibrated" else getattr(self, attack)
        labels = np.unique(self.conversation, return_inverse=True)[1]
        mean: ndarray = np.bincount(labels, scores) / np.bincount(labels)
        return mean


def closeness(
    vectors: Float32[ndarray, "n E"], corpus: Float32[ndarray, "M E"], positives: Sequence[ndarray]
) -> Float32[ndarray, " n"]:
    """Cosine of each vector and the nearest of its right answers, rows of `corpus`."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = np.empty(len(vectors), np.float32)
    for row, right in enumerate(positives):
        answers = corpus[right]
        found[row] = (answers @ unit[row] / np.linalg.norm(answers, axis=1)).max()
    return found


def membership(members: Closeness, others: Closeness, *, seed: int = 0) -> dict[str, Any]:
    """Attack conversation by conversation, with 95% intervals from resampling conversations.

    Args:
        members: Examples the model was trained on.
        others: Examples of conversations it never saw.
        seed: Of the bootstrap.

    Returns:
        `members` and `others`, the numbers of conversations, and `attacks`: by name (`ATTACKS`) the `auc`
        (0.5 is blind guessing, 1 is certainty), its interval, and `found_at_1_percent`, the share of training
        conversations that are found when one in a hundred others is taken for one (0.01 is blind guessing);
        None with fewer than a hundred others, which cannot tell.

    Raises:
        DataError: If either side has fewer than ten conversations.
    """
    counts = [len(np.unique(side.conversation)) for side in (members, others)]
    if min(counts) < 10:
        raise DataError(f"membership: {counts[0]} and {counts[1]} conversations; at least ten are needed")
    rng = np.random.default_rng(seed)
    attacks = {}
    for name in ATTACKS if members.query is not None else ATTACKS[:1]:
        inside, outside = members.of(name), others.of(name)
        drawn = [
            auc(rng.choice(inside, len(inside)), rng.choice(outside, len(outside))) for _ in range(DRAWS)
        ]
        low, high = np.quantile(drawn, [0.025, 0.975])
        attacks[name] = {
            "auc": auc(inside, outside),
            "auc_interval": [float(low), float(high)],
            "found_at_1_percent": _found(inside, outside),
        }
    return {"members": counts[0], "others": counts[1], "attacks": attacks}


def auc(inside: ndarray, outside: ndarray) -> float:
    """Probability that a member scores higher than another one, ties counted half (Mann and Whitney)."""
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    above = ranks[: len(inside)].sum() - len(inside) * (len(inside) + 1) / 2
    return float(above / (len(inside) * len(outside)))


def _found(inside: ndarray, outside: ndarray) -> float | None:
    """Share of members above the threshold that at most one in a hundred others exceeds."""
    if len(outside) < 1 / FALSE_ALARMS:
        return None
    allowed = int(FALSE_ALARMS * len(outside))
    threshold = np.sort(outside)[::-1][allowed]
    return float((inside > threshold).mean())
