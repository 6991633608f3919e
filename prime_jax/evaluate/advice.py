"""Which predictor to train with the data at hand; the figures behind it are in docs/studies/text.md."""

from collections.abc import Mapping
from pathlib import Path

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


def better_baseline(methods: Mapping[str, Mapping[str, float]], data: Path) -> str:
    """How to ship the baseline that beat the prediction, "" where none did that can be exported.

    Args:
        methods: Of a report: figures by metric for each method.
        data: The data folder.
    """
    best = max(methods, key=lambda name: methods[name]["MRR@10"])
    candidate = AS_CANDIDATE.get(best, best)
    if candidate not in UNTRAINED:
        return ""
    return (
        f"Here the baseline {best} is better than the prediction: prime-jax export --baseline {candidate} "
        f"--data {data} --out bundle makes a bundle of it."
    )
