"""XLM-R and RoBERTa, through the door of BERT: equal to transformers on small random folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from transformers import RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel

from prime_jax.errors import ConfigError
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.writing import write_encoder

TEXTS = ["the cat sat on a mat", "", "rain", " ".join(["quiet hills and dogs ran home"] * 4)]
FAMILY = {"xlm-roberta": (XLMRobertaConfig, XLMRobertaModel), "roberta": (RobertaConfig, RobertaModel)}


def written(folder: Path, kind: str) -> Any:
    """A random model of transformers in `folder`, its padding token 1 as that of the published ones."""
    torch.manual_seed(0)
    make_config, make_model = FAMILY[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    model = make_model(make_config(vocab_size=len(tiny_bert.VOCABULARY), **sizes)).eval()
    for weight in model.parameters():
        with torch.no_grad():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tiny_bert.write_tokenizer(folder / "tokenizer.json", tiny_bert.VOCABULARY)
    return model


@pytest.mark.parametrize("kind", sorted(FAMILY))
def test_equal_to_transformers(kind: str, tmp_path: Path) -> None:
    model = written(tmp_path / "model", kind)
    encoder = BertTextEncoder(tmp_path / "model", pooling="mean")
    found = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([tiny_bert.token_ids(text, encoder.max_length)])
        with torch.inference_mode():
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-5)
    write_encoder(encoder, tmp_path / "again")
    np.testing.assert_array_equal(BertTextEncoder(tmp_path / "again").encode(TEXTS), found)


def test_positions_up_to_padding_are_not_for_texts(tmp_path: Path) -> None:
    """42 positions, of which 0 and 1 are never used."""
    written(tmp_path, "xlm-roberta")
    assert BertTextEncoder(tmp_path, pooling="cls").max_length == 40
    with pytest.raises(ConfigError, match="max_length 41 is not from 3 to 40"):
        BertTextEncoder(tmp_path, pooling="cls", max_length=41)
