"""What becomes of a conversation's words: order, separators, cutting, special tokens that texts spell out."""

from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from prime_jax.data.conversations import ConversationTokenizer
from prime_jax.errors import DataError
from prime_jax.models.text import TextConfig
from prime_jax.pretrained.bert import BertTextEncoder

WORD = {word: number for number, word in enumerate(tiny_bert.VOCABULARY)}
CLS, SEP = 2, 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny_bert.write_tokenizer(tmp_path / "tokenizer.json", tiny_bert.VOCABULARY)
    return tmp_path / "tokenizer.json"


def ids(words: str) -> list[int]:
    return [WORD[word] for word in words.split()]


def test_newest_turn_first(file: Path) -> None:
    read = ConversationTokenizer(file, max_tokens=32, max_turns=10)
    (found,) = [read.joined(*pieces) for pieces in [(ids("cat"), [ids("the mat"), ids("rain")])]]
    assert found.tolist() == [CLS, WORD["cat"], SEP, WORD["rain"], SEP, *ids("the mat"), SEP]
    assert read([["the", "mat", "rain"]], ["cat"]).tokens.tolist() == [
        *(CLS, WORD["cat"], SEP, WORD["rain"], SEP, WORD["mat"], SEP, WORD["the"], SEP)
    ]
    assert read.cut == 0


def test_without_separators(file: Path) -> None:
    read = ConversationTokenizer(file, max_tokens=32, max_turns=10, separate=False)
    assert read([["the mat", "rain"]], ["cat"]).tokens.tolist() == [CLS, *ids("cat rain the mat"), SEP]


@pytest.mark.parametrize("most", range(8, 14))
def test_the_oldest_words_are_cut_and_counted(file: Path, most: int) -> None:
    """The whole has 13 tokens."""
    read = ConversationTokenizer(file, max_tokens=most, max_turns=10)
    turns, query = ["the cat sat", "rain fell"], "dogs ran home"
    whole = [CLS, *ids(query), SEP, *ids(turns[1]), SEP, *ids(turns[0]), SEP]
    assert len(whole) == 12
    found = read([turns], [query]).tokens.tolist()
    assert found == (whole if most >= 12 else [*whole[: most - 1], SEP])
    assert read.cut == (most < 12)
    read([[], turns], [query, query])
    assert read.cut == 2 * (most < 12)


def test_a_window_of_turns(file: Path) -> None:
    read = ConversationTokenizer(file, max_tokens=32, max_turns=1)
    assert read([["the", "rain"]], ["cat"]).tokens.tolist() == [CLS, WORD["cat"], SEP, WORD["rain"], SEP]
    none = ConversationTokenizer(file, max_tokens=32, max_turns=0)
    assert none([["the", "rain"]], ["cat"]).tokens.tolist() == [CLS, WORD["cat"], SEP]


def test_a_text_cannot_spell_a_separator(file: Path) -> None:
    read = ConversationTokenizer(file, max_tokens=32, max_turns=10)
    found = read([["[SEP] [CLS]"]], ["cat [SEP] rain"]).tokens
    assert np.sum(found == SEP) == 2
    assert np.sum(found == CLS) == 1


def test_a_query_alone_is_read_as_the_encoder_reads_it(tmp_path: Path) -> None:
    folder = tiny_bert.write_folder(tmp_path / "tiny", tiny_bert.tensors())
    encoder = BertTextEncoder(folder)
    read = ConversationTokenizer(folder / "tokenizer.json", max_tokens=32, max_turns=10)
    for text in ("the cat sat", "", "unheard rain"):
        assert read([[]], [text]).tokens.tolist() == encoder.tokenize([text])[0].tolist()


def test_another_tokenizer_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="separates texts by token 3, the model was trained with 9"):
        ConversationTokenizer.of_model(TextConfig(separator_id=9), file)
    with pytest.raises(DataError, match="the file is missing"):
        ConversationTokenizer.of_model(TextConfig(), tmp_path / "none.json")
    file.write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        ConversationTokenizer.of_model(TextConfig(), file)


def test_a_tokenizer_with_other_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="puts 0 special tokens around a text"):
        ConversationTokenizer(tmp_path / "tokenizer.json", max_tokens=8, max_turns=1)
