"""What matters about a decoder's architecture, without naming Megatron or Hugging Face.

    shape = ModelShape(num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2,
                       kv_channels=32, vocab_size=507)
    frequencies = rotary_frequencies(shape.kv_channels, shape.rotary_base, shape.rope_scaling)     # [D/2]

RMSNorm, RoPE, grouped-query attention, SwiGLU, no dropout; a mixture of experts in every layer or in none. Sliding
windows, shared experts and layers of several kinds have no place here: the families refuse them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretched positions: slow channels turn `factor` times slower, fast ones as before.

    Example: `RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)`
    """

    factor: float
    low_freq_factor: float
    """Channels with fewer full turns than this in the original context are slowed by the whole factor."""
    high_freq_factor: float
    """Channels with more turns than this are left as they are; between the two, a blend."""
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}: they bound "
                "the channels that are blended"
            )


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The mixture of experts that stands for the MLP of every layer.

    Example: `ExpertShape(num_experts=128, num_experts_per_token=8, ffn_hidden_size=768)`
    """

    num_experts: int
    num_experts_per_token: int
    ffn_hidden_size: int
    """Of one expert."""
    normalizes_weights: bool = True
    """Whether the weights of a token's experts are divided by their sum."""

    def __post_init__(self) -> None:
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token {self.num_experts_per_token} exceeds num_experts {self.num_experts}; a token "
                "cannot go to more experts than there are"
            )
        if self.normalizes_weights and self.num_experts_per_token == 1:
            raise ValueError("one expert a token with normalised weights has no gradient to its router; choose more experts")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Architecture facts of a decoder.

    Example: `ModelShape(num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2,
    kv_channels=32, vocab_size=507)`
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of the dense MLP; carried along where `experts` stand in its place."""
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads."""
    kv_channels: int
    """Channels of one head."""
    vocab_size: int
    """Real entries, without padding."""
    rotary_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    layernorm_epsilon: float = 1e-6
    tie_word_embeddings: bool = False
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    experts: ExpertShape | None = None
    max_position_embeddings: int = 32_768
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rotary_base) and self.rotary_base > 0):
            raise ValueError(f"rope_theta {self.rotary_base} must be a finite number above 0: channels turn by its powers")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}; every key-value head serves the same number of query heads"
            )
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels {self.kv_channels} must be even: RoPE rotates pairs of channels")


def padded_vocab_size(vocab_size: int, tp: int, divisible_by: int = 128) -> int:
    """The smallest multiple of `divisible_by * tp` that holds the vocabulary."""
    unit = divisible_by * tp
    return (vocab_size + unit - 1) // unit * unit


def rotary_frequencies(head_dim: int, rotary_base: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair of channels, fp32 [D/2].

    With `scaling`, a channel that makes n turns in the original context of C tokens keeps the share
    k = clamp((n - low) / (high - low), 0, 1) of its frequency f and gets f * (k + (1 - k) / factor).
    """
    frequencies = 1.0 / rotary_base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)  # [D/2]
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # [D/2]
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)
