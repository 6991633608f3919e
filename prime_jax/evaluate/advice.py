"""Which predictor to train with the data at hand; the figures behind it are in docs/studies/text.md."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime_jax.config import Config
from prime_jax.data.encode import Encoder
from prime_jax.evaluate import UNTRAINED
from prime_jax.pretrained.bert import BertTextEncoder

AS_CANDIDATE = {"conversation_text": "text"}
"""Baselines of a report by their names in `prime-jax tune`, where these differ."""

FEW = 150
"""Fewer training examples than were measured; nothing is known of what they do for a text predictor."""


def advice(config: Config | None, encoder: Encoder, examples: int) -> str:
    """What else to train, "" where this is what there is.

    Args:
        config: Of the run that was measured.
        encoder: Of its memory.
        examples: In the train split.
    """
    if config is None or config.steered:
        return ""
    if config.model.reads_text:
        if examples >= FEW:
            return ""
        return (
            f"{examples} training examples are fewer than any that a text predictor was measured with: "
            "compare it with conversation_text and query before you use it."
        )
    if isinstance(encoder, BertTextEncoder) and examples >= FEW:
        return (
            f"The encoder of this memory can be trained here, and there are {examples:,} training examples: "
            "configs/recommended.yaml, which reads the words, found more on booking dialogues, at every size "
            "that was measured (docs/studies/text.md)."
        )
    return ""


def better_baseline(scores: Mapping[str, float], data: Path, config: Config | None) -> str:
    """How to ship the baseline that beat the prediction, "" where none did that can be exported.

    Args:
        scores: MRR@10 of each method.
        data: The data folder.
        config: Of the run that was measured.
    """
    best = max(scores, key=lambda name: scores[name])
    candidate = AS_CANDIDATE.get(best, best)
    if config is None or config.steered or config.data.context_from != "data" or candidate not in UNTRAINED:
        return ""  # turns that are not those of the data cannot be named on the command line
    read: dict[str, Any] = {
        "baseline": candidate,
        "data": data,
        "encoder": config.data.encoder,
        "query-prefix": config.data.query_prefix,
        "passage-prefix": config.data.passage_prefix,
        "max-turns": config.model.max_context_length,
        "out": "bundle",
    }
    words = [word for name, value in read.items() if value for word in (f"--{name}", str(value))]
    return (
        f"Here the baseline {best} is better than the prediction; to make a bundle of it: "
        f"prime-jax export {shlex.join(words)}"
    )
