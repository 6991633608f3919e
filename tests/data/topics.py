"""A little world for steering: passages of some topics, and questions that tell theirs."""

from pathlib import Path

from fakes import BagOfWords

from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.prepare import prepare
from prime_jax.data.records import SPLITS, Dataset, Example, Passage, write_dataset

TOPICS, EACH = 4, 12


def topics(folder: Path, *, splits: tuple[str, ...] = ("train", "dev"), questions: int = 10) -> Dataset:
    """Write it. Every third question has two right answers; every other one a turn and an excluded passage.

    Question 0 of topic 0 has no word that any passage has.
    """
    corpus = tuple(
        Passage(f"p{topic}-{at}", f"topic{topic} topic{topic} topic{topic} thing{topic}x{at}")
        for topic in range(TOPICS)
        for at in range(EACH)
    )
    rows: dict[str, tuple[Example, ...]] = {}
    for split in splits:
        rows[split] = tuple(
            Example(
                f"{split}{topic}-{number}",
                (f"{split} turn {topic} {number}",) if number % 2 else (),
                f"ask{topic} {split}{number}"
                + (f" topic{topic} thing{topic}x{number}" if topic + number else ""),
                tuple(f"p{topic}-{(number + more) % EACH}" for more in range(2 if number % 3 == 0 else 1)),
                exclude=(f"p{topic}-{(number + 5) % EACH}",) if number % 2 else (),
            )
            for number in range(questions)
            for topic in range(TOPICS)
        )
    dataset = Dataset(corpus, rows)
    write_dataset(folder, dataset)
    return dataset


def open_topics(folder: Path, splits: tuple[str, ...] = ("train", "dev")) -> EmbeddedDataset:
    """The world as rows of its store."""
    dataset, store = prepare(folder, [name for name in SPLITS if name in splits], BagOfWords())
    return embed_dataset(dataset, store, max_context_length=3)
