"""What to make of a prediction, in plain words."""

from typing import NamedTuple

from prime_jax.explain.explanation import Influence
from prime_jax.explain.known import Usual, rank_among

UNSURE, SURE = 0.25, 0.75  # shares of known questions with a lower confidence
CLEAR = 0.5  # weight of a subspace that leaves no doubt which one is first
FAR = 0.95  # share of known questions with a lower atypicality
MOVED = 0.5  # share of known questions that steering moves less


class Reading(NamedTuple):
    """What the words depend on.

    Attributes:
        ranked: Subspaces by weight, largest first; empty without a router.
        primary: Name of the primary subspace.
        confidence: Its weight, or None.
        atypicality: Norm of the fine part, or None.
        influence: What steering changed.
    """

    ranked: list[tuple[str, float]]
    primary: str
    confidence: float | None
    atypicality: float | None
    influence: Influence


def signal_of(read: Reading, usual: Usual | None) -> str:
    """One to three sentences: where to search, how far to trust it, and what steering did."""
    return " ".join([_where(read, usual), *_far(read, usual), *_steered(read, usual)])


def _where(read: Reading, usual: Usual | None) -> str:
    if read.confidence is None:
        return f"The prediction lies nearest to “{read.primary}”."
    rank = 0.5 if usual is None else rank_among(usual.confidence, read.confidence)
    if rank >= SURE:
        return f"Search “{read.primary}”: the router is surer of it than for most known questions."
    if rank < UNSURE and read.confidence < CLEAR and len(read.ranked) > 1:
        second, weight = read.ranked[1]
        return (
            f"The router hesitates between “{read.primary}” ({read.confidence:.0%}) and “{second}” "
            f"({weight:.0%}): search both, or ask for more."
        )
    return f"Search “{read.primary}” first; the router is about as sure as usual."


def _far(read: Reading, usual: Usual | None) -> list[str]:
    if read.atypicality is None or usual is None or rank_among(usual.atypicality, read.atypicality) < FAR:
        return []
    return [
        "The answer is atypical: it lies further from what these subspaces stand for than for "
        f"{FAR:.0%} of the known questions, so check what is found."
    ]


def _steered(read: Reading, usual: Usual | None) -> list[str]:
    before = read.influence.subspace_without
    if before != read.primary:
        return [f"Steering decided: without it the answer would lie in “{before}”."]
    moved = read.influence.l2 if usual is None else rank_among(usual.influence, read.influence.l2)
    return ["Steering moved the answer within the same subspace."] if moved > MOVED else []
