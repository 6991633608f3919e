"""Which predictor to train with the data at hand; the figures behind it are in docs/studies/text.md."""

from prime_jax.config import Config
from prime_jax.data.encode import Encoder
from prime_jax.pretrained.bert import BertTextEncoder

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
