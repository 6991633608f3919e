"""A trained encoder back into a folder as sentence-transformers and Hugging Face read it."""

import json
import shutil
from pathlib import Path

from flax import nnx
from safetensors.numpy import save_file

from prime_jax.files import write_json
from prime_jax.nn.torch_layout import tensors_of
from prime_jax.pretrained.bert import BertTextEncoder


def write_encoder(encoder: BertTextEncoder, folder: Path) -> None:
    """Write an encoder with its tokenizer, pooling and maximum length; reading it gives the same encoder.

    Args:
        encoder: What to write, with the parameters it has now.
        folder: Must not exist.
    """
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(encoder.source.transformer / name, folder / name)
    tensors = tensors_of(nnx.merge(encoder.graph, encoder.params))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (folder / "2_Normalize").mkdir()
    pooling = {
        "word_embedding_dimension": encoder.dim,
        "pooling_mode_cls_token": encoder.pooling == "cls",
        "pooling_mode_mean_tokens": encoder.pooling == "mean",
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    settings = {"max_seq_length": encoder.max_length, "do_lower_case": encoder.source.lower_case}
    write_json(folder / "sentence_bert_config.json", settings)
