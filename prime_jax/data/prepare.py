"""From a folder of texts to embeddings that are ready to train on or to search."""

from collections.abc import Sequence
from pathlib import Path

from prime_jax.data.encode import Encoder, encode_texts
from prime_jax.data.one_text import as_one_text
from prime_jax.data.records import Dataset, load_dataset
from prime_jax.data.store import EmbeddingStore

STORE = "embeddings"


def dataset_texts(
    dataset: Dataset,
    *,
    query_prefix: str = "",
    passage_prefix: str = "",
    turns_of_one_text: int | None = None,
) -> list[str]:
    """Every text of a dataset that needs an embedding, each with its prefix, in a fixed order.

    With `turns_of_one_text` these are also the query of each example and so many of its turns as one text.
    """
    texts = [passage_prefix + passage.text for passage in dataset.corpus]
    for examples in dataset.splits.values():
        for example in examples:
            texts += [query_prefix + turn for turn in (*example.context, example.query)]
            if turns_of_one_text is not None:
                newest = example.context[max(0, len(example.context) - turns_of_one_text) :]
                texts.append(query_prefix + as_one_text(example.query, newest))
    return list(dict.fromkeys(texts))


def prepare(
    folder: Path,
    splits: Sequence[str],
    encoder: Encoder,
    *,
    store_folder: Path | None = None,
    query_prefix: str = "",
    passage_prefix: str = "",
    turns_of_one_text: int | None = None,
) -> tuple[Dataset, EmbeddingStore]:
    """Load splits of a data folder and encode whatever its store does not hold yet.

    Args:
        folder: Data folder in the JSONL contract.
        splits: Which splits to load.
        encoder: Embeds the texts that are missing.
        store_folder: Where embeddings are kept; None means `embeddings/` in the data folder.
        query_prefix: Put before queries and turns.
        passage_prefix: Put before passages.
        turns_of_one_text: Encode the query and so many newest turns of each example as one text, too.

    Raises:
        DataError: If a file breaks the contract, or a shard of the store is damaged, changed or holds NaN;
            the message names it.
    """
    dataset = load_dataset(folder, splits)
    store = EmbeddingStore.open(store_folder or folder / STORE, encoder.identity, encoder.dim)
    store.verify(again=False)
    texts = dataset_texts(
        dataset, query_prefix=query_prefix, passage_prefix=passage_prefix, turns_of_one_text=turns_of_one_text
    )
    encode_texts(texts, encoder, store)
    return dataset, store
