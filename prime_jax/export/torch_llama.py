"""Llama layers for torch_runtime.py; a bundle whose model has such layers holds the two as one file.

They compute what `prime_jax.nn.llama` does: RMSNorm, grouped-query attention with rotary positions, SwiGLU.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from prime_jax.export.torch_runtime import BLOCKS, PredictorConfig

# Everything above this line is in torch_runtime.py already.


class RMSNorm(nn.Module):
    """`x` divided by its root mean square, times a scale `[H]`."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_dim))
        self.epsilon = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon) * self.weight


class LlamaAttention(nn.Module):
    """Grouped-query attention whose queries and keys are turned by their positions."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or config.hidden_dim // config.num_heads
        asking, asked = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_dim, asking, bias=False)
        self.k_proj = nn.Linear(config.hidden_dim, asked, bias=False)
        self.v_proj = nn.Linear(config.hidden_dim, asked, bias=False)
        self.o_proj = nn.Linear(asking, config.hidden_dim, bias=False)

    def forward(self, x: Tensor, blocked: Tensor, positions: Tensor, rows: int | None) -> Tensor:
        """Attend from the first `rows` tokens (None: all) to every token that is not blocked."""
        angles = positions[:, None, :, None] * self._frequencies(x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        queries = _turned(self._heads(self.q_proj(x[:, :rows])), cos[:, :, :rows], sin[:, :, :rows])
        keys = _turned(self._heads(self.k_proj(x)), cos, sin)
        values = self._heads(self.v_proj(x))
        shared = self.heads // self.kv_heads
        keys, values = (part.repeat_interleave(shared, dim=1) for part in (keys, values))
        rate = self.config.dropout if self.training else 0.0
        mixed: Tensor = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=~blocked[:, None, :rows], dropout_p=rate
        )
        answer: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return answer

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _frequencies(self, device: torch.device) -> Tensor:
        """Radians per position of each pair of dimensions, `[head_dim / 2]`, long waves stretched."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        plain: Tensor = self.config.rope_theta**-exponents
        scaling = self.config.rope_scaling
        if scaling is None:
            return plain
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
        kept = ((waves - low) / (high - low)).clamp(0.0, 1.0)
        stretched: Tensor = kept * plain + (1 - kept) * plain / scaling["factor"]
        return stretched


class LlamaMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        width = config.mlp_dim or 4 * config.hidden_dim
        self.gate_proj = nn.Linear(config.hidden_dim, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_dim, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        answer: Tensor = self.dropout(self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))
        return answer


class LlamaBlock(nn.Module):
    """Pre-norm block with the names of a Hugging Face Llama."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, blocked: Tensor, positions: Tensor, rows: int | None = None) -> Tensor:
        """Transform the first `rows` tokens (None: all), letting them look at every token not blocked.

        Args:
            x: Tokens, `[B, S, H]`.
            blocked: True where a row token may not look at a column token, `[B, S, S]`.
            positions: Of the tokens, `[B, S]`.
            rows: How many leading tokens to compute; the last layer needs only [PRED].
        """
        x = x[:, :rows] + self.self_attn(self.input_layernorm(x), blocked, positions, rows)
        answer: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return answer


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i of every head together with dimension i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


BLOCKS["llama"] = (LlamaBlock, RMSNorm)
