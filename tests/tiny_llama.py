"""Small random Llama folders, written by transformers, and the settings of a predictor with such layers."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

HIDDEN, HEADS, KV, HEAD_DIM, INNER, LAYERS = 128, 4, 2, 16, 96, 3
SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SETTINGS: dict[str, Any] = {  # of PredictorConfig
    "block": "llama",
    "hidden_dim": HIDDEN,
    "num_heads": HEADS,
    "num_kv_heads": KV,
    "head_dim": HEAD_DIM,
    "mlp_dim": INNER,
    "norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": SCALING,
}


def llama(seed: int = 0, **fields: Any) -> LlamaModel:
    """A Llama of transformers with random weights, norms included."""
    sizes = {
        "vocab_size": 8,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500.0, **SCALING},
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    model = LlamaModel(LlamaConfig(**(sizes | fields))).eval()
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.normal_(1.0, 0.2) if "norm" in name else weight.normal_(0.0, weight.shape[-1] ** -0.5)
    return model


def write(folder: Path, model: LlamaModel, **options: Any) -> Path:
    """The folder as Hugging Face has it."""
    model.save_pretrained(folder, **options)
    return folder
