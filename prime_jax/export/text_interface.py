"""Models that read conversations: token ids and a mask in, the vector to search with out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.data.conversations import TOKENIZER, ConversationTokenizer
from prime_jax.errors import DataError, ExportError
from prime_jax.evaluate.arrays import Split
from prime_jax.export.card_words import text_words
from prime_jax.export.interface import Arrays, Company, Interface, Tensor, Words, source_of
from prime_jax.export.joining import READING, joined
from prime_jax.models import Model
from prime_jax.models.text import TextConfig, TextPredictor
from prime_jax.pretrained.tokenizer import read_tokenizer

SEED = 0


class TextInterface(Interface):
    """`input_ids` and `attention_mask`, any number of rows of any length; roles are computed in the graph.

    Args:
        config: Of the model, complete.
    """

    files = (TOKENIZER,)

    def __init__(self, config: TextConfig):
        self.config: TextConfig = config
        self.stranger = (f"a row of {config.max_tokens} tokens", {"tokens": config.max_tokens})
        ids = "Token ids of a conversation, [B, T]: the query, then the turns, newest first; padding behind."
        real = "1 where a token is real, 0 where it is padding, [B, T]; what stands in padding is ignored."
        self.inputs = [
            Tensor("input_ids", "int32", ("T",), ids),
            Tensor("attention_mask", "int32", ("T",), real),
        ]
        meaning = "Unit-norm embedding to search with, [B, E]."
        self.outputs = [Tensor("embedding", "float32", (config.output_dim,), meaning)]

    def predict(self, model: Model, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What JAX answers; positions are counted from the mask, a graph of any length has no other count."""
        assert isinstance(model, TextPredictor)
        mask = given["attention_mask"]
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        return {"embedding": model(given["input_ids"], mask > 0, positions=positions)}

    def predict_in_torch(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the torch module answers."""
        return {"embedding": model(given["input_ids"], given["attention_mask"])}

    def torch_source(self) -> str:
        """torch_text.py, with what it imports of torch_runtime.py written out."""
        return joined(source_of("torch_text.py"), source_of("torch_runtime.py"), READING)

    def golden_inputs(self) -> Arrays:
        """Sequences of 0 to N turns, as far as they fit, the last as long as there may be.

        Padding holds ids like the rest, separators too, so that a consumer who forgets the mask gets wrong
        numbers.
        """
        config = self.config
        assert config.encoder is not None
        assert config.separator_id is not None
        rng = np.random.default_rng(SEED)
        rows, width = config.max_context_length + 1, config.max_tokens
        ids = rng.integers(0, config.encoder.vocab_size - 1, (rows, width))
        ids += ids >= config.separator_id  # every id but that of the separator
        lengths = np.zeros(rows, np.int64)
        for row in range(rows):
            separators = min(row, (width - 2) // 2) + 1 if config.separate_turns else 1
            lengths[row] = width if row == rows - 1 else rng.integers(2 * separators, width + 1)
            inside = rng.choice(np.arange(1, lengths[row] - 1), separators - 1, replace=False)
            ids[row, [*inside, lengths[row] - 1]] = config.separator_id
            ids[row, lengths[row] :: 3] = config.separator_id
        mask = np.arange(width) < lengths[:, None]
        return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}

    def requests(self, split: Split, source: Path, query_prefix: str) -> Arrays:
        """The conversations of a split as token ids, padded to the longest."""
        assert split.context_texts is not None
        assert split.query_texts is not None
        tokenizer = ConversationTokenizer.of_model(self.config, source / TOKENIZER)
        sequences = tokenizer(split.context_texts, [query_prefix + query for query in split.query_texts])
        width = int(sequences.lengths.max(initial=1))
        mask = np.arange(width) < sequences.lengths[:, None]
        ids = sequences.padded(np.arange(len(sequences)), width)
        return {"input_ids": ids, "attention_mask": mask.astype(np.int32)}

    def alone(self, golden: Arrays) -> Iterator[Arrays]:
        """Each golden request by itself, as wide as the longest."""
        for row in range(len(golden["input_ids"])):
            yield {name: golden[name][row : row + 1] for name in self.names}

    def without_padding(self, golden: Arrays) -> Iterator[Arrays]:
        """Each golden request by itself without its padding."""
        for row, length in enumerate(golden["attention_mask"].sum(axis=1)):
            yield {name: golden[name][row : row + 1, :length] for name in self.names}

    def beside_a_stranger(self, golden: Arrays) -> Company:
        """The golden requests behind a row without padding, with zeros in their own."""
        mask = golden["attention_mask"]
        ids = np.concatenate([golden["input_ids"][::-1][:1], golden["input_ids"] * mask])
        mask = np.concatenate([np.ones_like(mask[:1]), mask])
        return Company({"input_ids": ids, "attention_mask": mask}, np.arange(1, len(ids)))

    def metadata(self) -> dict[str, object]:
        """Facts about the model in its ONNX file."""
        config = self.config
        return {
            "kind": config.kind,
            "output_dim": config.output_dim,
            "max_context_length": config.max_context_length,
            "max_tokens": config.max_tokens,
            "separator_id": config.separator_id,
            "pooling": config.pooling,
            "normalised": "true",
        }

    def words(self, facts: Mapping[str, Any]) -> Words:
        """What the card says of this kind."""
        return text_words(self.config, facts)

    def check_files(self, folder: Path | None) -> None:
        """Refuse a folder without the tokenizer, or with one that the model was not trained with.

        Raises:
            ExportError: Naming the file.
        """
        super().check_files(folder)
        assert folder is not None
        file = folder / TOKENIZER
        try:
            ConversationTokenizer.of_model(self.config, file)
        except DataError as unfit:
            raise ExportError(str(unfit)) from None
        assert self.config.encoder is not None
        known, most = read_tokenizer(file).get_vocab_size(), self.config.encoder.vocab_size
        if known > most:
            raise ExportError(f"{file}: knows {known:,} tokens, the model {most:,}; it is another one's")
