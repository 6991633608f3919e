"""The builder: what each variant points at, what it may not know, and what it refuses."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import BagOfWords
from topics import EACH, TOPICS, open_topics, topics

from prime_jax.data.clusters import nearest
from prime_jax.data.keywords import Vocabulary, keywords_of
from prime_jax.data.records import Dataset, Passage, load_dataset, write_dataset
from prime_jax.data.steered import VARIANTS, open_steering, pairs_of
from prime_jax.data.steering import build_steering, main
from prime_jax.data.store import INDEX, EmbeddingStore
from prime_jax.errors import ConfigError, DataError
from prime_jax.manifest import verify_manifest

COMMAND = ("--encoder", "fakes:encoder", "--clusters", "4")


def build(folder: Path, **given: Any) -> dict[str, Any]:
    return build_steering(folder, BagOfWords(), clusters=TOPICS, **given)


def normed(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_every_variant_against_a_loop(tmp_path: Path) -> None:
    dataset = topics(tmp_path)
    build(tmp_path, keywords=2)
    data = open_topics(tmp_path)
    steering = open_steering(tmp_path / "steering", data, "bag-of-words")
    vocabulary, encoder = Vocabulary.of(passage.text for passage in dataset.corpus), BagOfWords()
    for name, split in data.splits.items():
        vectors, predicted = steering.vectors(name), steering.predicted(name)
        example, target = pairs_of(split)
        assert vectors.shape == (len(target), len(VARIANTS), data.store.dim) == (TOPICS * 14, 4, 24)
        for pair, (number, right) in enumerate(zip(example, target, strict=True)):
            question = encoder.encode([dataset.splits[name][number].query])[0]
            own = steering.assignment[right]
            near = int(np.argmax(steering.centroids @ question))
            words = keywords_of(dataset.splits[name][number].query, vocabulary, 2)
            expected = [
                normed(steering.centroids[own] - question),
                normed(encoder.encode(words).sum(axis=0)) if words else np.zeros(24),
                normed(question - steering.centroids[near]),
                normed(steering.centroids[predicted[pair]] - question),
            ]
            np.testing.assert_allclose(vectors[pair], expected, atol=1e-5)
            assert steering.clusters(name)[pair] == own
    # Question 0 of topic 0 has no word of the corpus; it has two right answers.
    silent = ~steering.vectors("dev")[:, VARIANTS.index("keyword")].any(axis=1)
    assert np.flatnonzero(silent).tolist() == [0, 1]


def test_clusters_are_the_topics_and_are_named_after_them(tmp_path: Path) -> None:
    topics(tmp_path)
    build(tmp_path)
    names = json.loads((tmp_path / "steering/names.json").read_text())
    steering = open_steering(tmp_path / "steering", open_topics(tmp_path), "bag-of-words")
    for topic in range(TOPICS):
        (cluster,) = set(steering.assignment[topic * EACH : (topic + 1) * EACH].tolist())
        # 12 of 48 passages are too many for "topic0"; each passage has a thing of its own
        assert names[cluster]["name"] == ", ".join(sorted(f"thing{topic}x{at}" for at in range(EACH))[:3])
        assert names[cluster]["size"] == EACH
        assert steering.names[cluster] == names[cluster]["name"]


def test_the_cluster_is_predicted_from_the_question(tmp_path: Path) -> None:
    topics(tmp_path)
    facts = build(tmp_path)
    data = open_topics(tmp_path)
    steering = open_steering(tmp_path / "steering", data, "bag-of-words")
    for name, split in data.splits.items():
        routing = steering.facts["routing"][name]
        assert routing["predicted"] == np.mean(steering.predicted(name) == steering.clusters(name)) > 0.8
        questions = data.store[split.query_rows[pairs_of(split)[0]]]
        near = nearest(questions, steering.centroids)
        assert routing["nearest_centroid"] == np.mean(near == steering.clusters(name))
        assert routing["largest_cluster"] == 0.25
    assert steering.facts.items() >= facts.items()
    assert facts["groups"] == {"count": 40, "largest": 1}


def test_no_steering_of_train_has_seen_its_own_label_but_the_leaky_one(tmp_path: Path) -> None:
    """Give one training question an answer in another cluster: only `centroid` may notice."""
    dataset = topics(tmp_path / "before")
    changed = [*dataset.splits["train"]]
    changed[5] = replace(changed[5], positives=("p3-0",), exclude=())
    assert changed[5].query.startswith("ask1")
    write_dataset(tmp_path / "after", replace(dataset, splits={**dataset.splits, "train": tuple(changed)}))
    found = []
    for name in ("before", "after"):
        build(tmp_path / name)
        data = open_topics(tmp_path / name)
        steering = open_steering(tmp_path / name / "steering", data, "bag-of-words")
        pair = int(np.flatnonzero(pairs_of(data.splits["train"])[0] == 5)[0])
        found.append((steering.predicted("train")[pair], steering.vectors("train")[pair]))
    (cluster, before), (same, after) = found
    assert cluster == same
    np.testing.assert_array_equal(before[1:], after[1:])
    assert np.abs(before[0] - after[0]).max() > 0.1


def test_examples_that_share_a_turn_are_one_group(tmp_path: Path) -> None:
    """All of topic 0 share a turn, so for them the label is never seen and the prediction is always wrong."""
    dataset = topics(tmp_path)
    joined = tuple(
        replace(one, context=("the same turn",)) if one.query.startswith("ask0") else one
        for one in dataset.splits["train"]
    )
    write_dataset(tmp_path, replace(dataset, splits={**dataset.splits, "train": joined}))
    assert build(tmp_path)["groups"] == {"count": 31, "largest": 10}
    steering = open_steering(tmp_path / "steering", open_topics(tmp_path), "bag-of-words")
    own = pairs_of(open_topics(tmp_path).splits["train"])[0] % TOPICS == 0
    assert not (steering.predicted("train") == steering.clusters("train"))[own].any()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    topics(tmp_path)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        build(tmp_path, out=tmp_path / name, seed=seed)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 3 + 2 * 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    assert (tmp_path / "one/negatives_dev.npy").read_bytes() != (
        tmp_path / "other/negatives_dev.npy"
    ).read_bytes()


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    topics(tmp_path)
    encoder = BagOfWords()
    build_steering(tmp_path, encoder, clusters=TOPICS)
    assert "ask0" not in encoder.encoded  # in no passage
    assert "thing1x3" in encoder.encoded
    assert len(encoder.encoded) == len(set(encoder.encoded))
    encoder.encoded.clear()
    build_steering(tmp_path, encoder, clusters=TOPICS, seed=1)
    assert encoder.encoded == []


def test_prefixes_reach_questions_passages_and_keywords(tmp_path: Path) -> None:
    topics(tmp_path)
    encoder = BagOfWords()
    build_steering(tmp_path, encoder, clusters=TOPICS, query_prefix="q: ", passage_prefix="p: ")
    assert {text[:3] for text in encoder.encoded} == {"q: ", "p: "}
    assert "q: thing1x3" in encoder.encoded


def test_negatives_missing_are_counted(tmp_path: Path) -> None:
    """A cluster has 12 passages; every pair has one or two right ones in it and may exclude one."""
    topics(tmp_path)
    facts = build(tmp_path, tiers=(12, 0, 1, 0))
    steering = open_steering(tmp_path / "steering", open_topics(tmp_path), "bag-of-words")
    missing = facts["negatives_missing"]["train"]
    # 0 and 6: two answers, two pairs; 3 and 9: the same, one excluded; 1, 5, 7: one and one; 2, 4, 8: one
    assert missing["in the target's cluster"] == TOPICS * (2 * 2 * 2 + 2 * 2 * 3 + 3 * 2 + 3 * 1)
    assert (steering.negatives("train") == -1).sum() == sum(missing.values())


class TestCommand:
    def test_builds_and_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        topics(tmp_path, splits=("train", "dev", "test"))
        assert main(["--data", str(tmp_path), *COMMAND, "--tiers", "1", "1", "1", "1", "--seed", "3"]) == 0
        manifest = verify_manifest(tmp_path / "steering", "steering")
        assert (manifest["tiers"], manifest["seed"], manifest["clusters"]) == ([1, 1, 1, 1], 3, 4)
        assert list(manifest["pairs"].values()) == [TOPICS * 14] * 3
        printed = capsys.readouterr().out
        assert "4 of 48 passages" in printed
        assert "test       56 pairs" in printed

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--clusters", "49"], "48 passages, too few for 49 clusters"),
            (["--clusters", "1"], "--clusters is 1, it must be at least 2"),
            (["--tiers", "0", "0", "0", "0"], "four counts that are not all zero"),
            (["--tiers", "20", "20", "20", "20"], "too few for 80 hard negatives"),
            (["--keywords", "0"], "--keywords is 0"),
            (["--encoder", "nowhere"], "no encoder 'nowhere'"),
        ],
    )
    def test_mistakes_are_one_line_and_leave_nothing(
        self, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        topics(tmp_path)
        assert main(["--data", str(tmp_path), *COMMAND, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("prime-jax steering: ")
        assert said.count("\n") == 1
        assert message in said
        assert not (tmp_path / "steering").exists()
        assert not list(tmp_path.glob(".steering*"))

    def test_no_data(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--data", str(tmp_path / "none"), *COMMAND]) == 2
        assert "there is no such folder" in capsys.readouterr().err

    def test_without_train(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        topics(tmp_path, splits=("dev",))
        assert main(["--data", str(tmp_path), *COMMAND]) == 2
        assert "train.jsonl: is missing" in capsys.readouterr().err

    def test_deals_a_train_split_out(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        topics(tmp_path / "one", splits=("train",), questions=25)
        given = ["--data", str(tmp_path / "one"), *COMMAND, "--shares", "0.6", "0.2", "0.2"]
        assert main([*given, "--split-into", str(tmp_path / "three")]) == 0
        split = load_dataset(tmp_path / "three").splits
        assert {name: len(rows) for name, rows in split.items()} == {"train": 60, "dev": 20, "test": 20}
        for rows in split.values():  # each topic is a cluster
            assert len({len([1 for one in rows if f"ask{topic}" in one.query]) for topic in range(4)}) == 1
        assert "dev        20 examples" in capsys.readouterr().out
        assert main(["--data", str(tmp_path / "three"), *COMMAND]) == 0
        assert main(["--data", str(tmp_path / "three"), *COMMAND, "--split-into", str(tmp_path / "x")]) == 2
        assert "dev.jsonl: is there already" in capsys.readouterr().err


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    topics(tmp_path)
    with pytest.raises(DataError, match="is there already and is no steering"):
        build(tmp_path, out=tmp_path)
    assert (tmp_path / "corpus.jsonl").exists()
    build(tmp_path)
    build(tmp_path, seed=1)  # an older one is
    assert verify_manifest(tmp_path / "steering", "steering")["seed"] == 1


def test_a_broken_embedding_is_named(tmp_path: Path) -> None:
    dataset = topics(tmp_path)
    store = open_topics(tmp_path).store
    row = int(store.rows([dataset.splits["dev"][5].query])[0])
    values = store[[row]].tobytes()
    (shard,) = store.folder.glob("*.safetensors")
    content = shard.read_bytes()
    assert content.count(values) == 1
    broken = content.replace(values, np.full(24, np.nan, np.float32).tobytes())
    shard.write_bytes(broken)
    index = store.folder / INDEX  # an index that says so, too: what an encoder made, not damage to the file
    digests = (hashlib.sha256(one).hexdigest() for one in (content, broken))
    index.write_text(index.read_text().replace(*digests))
    with pytest.raises(DataError, match=f"{shard.name}: row {row} .*holds NaN or Inf"):
        build(tmp_path)
    assert not (tmp_path / "steering").exists()


def test_settings_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="four counts"):
        build(tmp_path, tiers=(1, 2))


def test_texts_that_are_alike(tmp_path: Path) -> None:
    dataset = topics(tmp_path / "from")
    corpus = tuple(Passage(passage.id, passage.text.split()[0]) for passage in dataset.corpus)
    write_dataset(tmp_path / "alike", Dataset(corpus, dataset.splits))
    with pytest.raises(DataError, match=r"has no passage.*smaller --clusters"):
        build_steering(tmp_path / "alike", BagOfWords(), clusters=6)
    assert EmbeddingStore.open(tmp_path / "alike/embeddings", "bag-of-words", 24)
