"""TF-IDF by hand."""

import math

import numpy as np
import pytest

from prime_jax.data.keywords import Vocabulary, keywords_of, name_clusters, words_of


def test_words_have_a_letter_and_two_characters() -> None:
    assert words_of("It's a B-52: Ü2 über_alles, 1984 naïve") == ["it", "ü2", "über_alles", "naïve"]


def test_rare_words_first_then_the_alphabet() -> None:
    texts = ["rare common", *["common"] * 4, *["other"] * 15]
    vocabulary = Vocabulary.of(texts)
    assert vocabulary.idf("common") == pytest.approx(math.log(20 / 5))
    assert vocabulary.idf("rare") == pytest.approx(math.log(20))
    # "other" is in 15 of 20, unknown words are in none
    assert keywords_of("unknown other common rare", vocabulary, 8) == ["rare", "common"]
    assert keywords_of("rare common common common", vocabulary, 8) == ["common", "rare"]  # 3 log 4 > log 20
    assert keywords_of("unknown other common rare", vocabulary, 1) == ["rare"]
    assert keywords_of("other? Unknown!", vocabulary, 8) == []
    assert keywords_of("b1 a1", Vocabulary(30, {"a1": 2, "b1": 2}), 8) == ["a1", "b1"]


def test_a_twentieth_of_a_large_corpus_is_too_common() -> None:
    vocabulary = Vocabulary(1000, {"just": 50, "over": 51})
    assert (vocabulary.tells("just"), vocabulary.tells("over")) == (True, False)


def test_clusters_are_named_by_their_own_words() -> None:
    texts = ["cat mouse", "cat shared", "dog shared", "dog bone kennel"]
    named = name_clusters(texts, np.array([0, 0, 1, 1], np.int32), Vocabulary.of(texts), 3)
    # 9 words, 4.5 in a cluster. Cat: 2 of 4 words, 2 in all. "mouse" 1 in all, "shared" 2, 1 here.
    cat, mouse = 2 / 4 * math.log(1 + 4.5 / 2), 1 / 4 * math.log(1 + 4.5 / 1)
    assert cat > mouse > 1 / 4 * math.log(1 + 4.5 / 2)
    assert named[0] == {"name": "cat, mouse, shared", "keywords": ["cat", "mouse", "shared"], "size": 2}
    assert named[1] == {"name": "dog, bone, kennel", "keywords": ["dog", "bone", "kennel"], "size": 2}


def test_a_cluster_without_words_has_its_number() -> None:
    named = name_clusters(["cat", "1 2 3"], np.array([0, 1], np.int32), Vocabulary.of(["cat", "1 2 3"]), 3)
    assert named[1] == {"name": "cluster 1", "keywords": [], "size": 1}
