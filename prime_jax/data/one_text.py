"""A conversation as one text, for encoders that are not trained on conversations."""

from collections.abc import Sequence

WORDS = 60
"""Most words of it; untrained encoders do worse with more."""


def as_one_text(query: str, turns: Sequence[str]) -> str:
    """Query and turns, given oldest first, the newest first, cut at `WORDS` words."""
    return " ".join(" ".join([query, *reversed(turns)]).split()[:WORDS])
