"""Conversations as token ids: query and turns in one sequence.

A sequence is `[CLS] query [SEP] newest turn [SEP] the one before [SEP] ...`, cut at a stated number of
tokens, so that the oldest words go first.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from prime_jax.data.embedded import EMPTY, EmbeddedDataset
from prime_jax.data.records import Dataset
from prime_jax.data.sequences import Sequences, Tokens
from prime_jax.errors import DataError
from prime_jax.models.text import TextConfig
from prime_jax.pretrained.tokenizer import read_tokenizer

TOKENIZER = "tokenizer.json"
"""The tokenizer's file in an encoder's folder, a checkpoint and a bundle."""


class ConversationTokenizer:
    """Makes one sequence of token ids of a query and the turns before it.

    Special tokens that a text spells out, such as "[SEP]", are read as ordinary characters.

    Args:
        file: A Hugging Face `tokenizer.json` that puts one special token before a text and one behind it.
        max_tokens: Longest sequence, special tokens included.
        max_turns: Most turns that are read, the newest ones.
        lower_case: Whether texts are lower-cased first.
        separate: Whether the token behind a text also stands between two turns.

    Attributes:
        cut: How many conversations so far had more tokens than were read.
        separator: Id of the token behind a text.

    Raises:
        DataError: If the file is missing or damaged, or the tokenizer has other special tokens.
        ConfigError: If the `tokenizers` package is not installed.
    """

    def __init__(
        self,
        file: Path,
        *,
        max_tokens: int,
        max_turns: int,
        lower_case: bool = False,
        separate: bool = True,
    ):
        self._tokenizer = read_tokenizer(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        frame = self._tokenizer.encode("").ids
        if len(frame) != 2:
            raise DataError(
                f"{file}: puts {len(frame)} special tokens around a text; only tokenizers that put one "
                "before and one behind it are supported"
            )
        self._tokenizer.encode_special_tokens = True
        self._start, self.separator = frame
        self._max_tokens, self._max_turns = max_tokens, max_turns
        self._lower_case, self._separate = lower_case, separate
        self.cut = 0

    @classmethod
    def of_model(cls, config: TextConfig, file: Path) -> "ConversationTokenizer":
        """What makes the sequences that a model was trained on.

        Raises:
            DataError: As the class; also if the tokenizer is not the one that the model was trained with.
        """
        made = cls(
            file,
            max_tokens=config.max_tokens,
            max_turns=config.max_context_length,
            lower_case=config.lower_case,
            separate=config.separate_turns,
        )
        if config.separator_id not in (None, made.separator):
            raise DataError(
                f"{file}: separates texts by token {made.separator}, the model was trained with "
                f"{config.separator_id}"
            )
        return made

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text alone, without special tokens."""
        given = [text.lower() for text in texts] if self._lower_case else list(texts)
        return [one.ids for one in self._tokenizer.encode_batch_fast(given, add_special_tokens=False)]

    def joined(self, query: Sequence[int], turns: Sequence[Sequence[int]]) -> Tokens:
        """One sequence of a query's pieces and those of the turns, oldest first."""
        tokens, room, whole = [self._start, *query], self._max_tokens - 1, True
        for turn in list(turns)[: -self._max_turns - 1 : -1]:
            if len(tokens) >= room:
                whole = False
                break
            tokens += [self.separator, *turn] if self._separate else turn
        self.cut += not whole or len(tokens) > room
        return np.array([*tokens[:room], self.separator], np.int32)

    def __call__(self, contexts: Sequence[Sequence[str]], queries: Sequence[str]) -> Sequences:
        """The sequences of some conversations: their turns, oldest first, and their queries."""
        texts = dict.fromkeys([*queries, *(turn for turns in contexts for turn in turns)])
        known = dict(zip(texts, self.pieces(list(texts)), strict=True))
        return Sequences.of(
            [
                self.joined(known[query], [known[turn] for turn in turns])
                for turns, query in zip(contexts, queries, strict=True)
            ]
        )


def context_texts(dataset: Dataset, data: EmbeddedDataset, name: str) -> list[list[str]]:
    """Turns of a split's examples as texts, oldest first: their own, or passages of a first search."""
    split = data.splits[name]
    if data.context_from == "data":
        most = split.context_rows.shape[1]
        return [list(one.context[max(0, len(one.context) - most) :]) for one in dataset.splits[name]]
    passages = dict(zip(data.corpus_rows.tolist(), (passage.text for passage in dataset.corpus), strict=True))
    return [[passages[row] for row in rows if row != EMPTY] for rows in split.context_rows.tolist()]


def with_sequences(
    dataset: Dataset, data: EmbeddedDataset, tokenizer: ConversationTokenizer, query_prefix: str = ""
) -> EmbeddedDataset:
    """The data with every split's conversations as token ids; `query_prefix` stands before their queries."""
    splits = {}
    for name, split in data.splits.items():
        queries = [query_prefix + one.query for one in dataset.splits[name]]
        splits[name] = replace(split, sequences=tokenizer(context_texts(dataset, data, name), queries))
    return replace(data, splits=splits)
